"""Checks of the way here: the port, and whether peers that were asked reached it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from statistics import median

from neurons.callback import is_public
from scripts.doctor.ask import Answer, Port
from scripts.doctor.options import DoctorOptions
from scripts.doctor.report import Finding, fail, ok, skipped, warn
from subnet.messages import CalledBack
from subnet.transport.knock import Outcome

FAR = 0.3
"""Seconds of a round trip above which a pipeline is mostly waiting."""


def check_port(port: Port | None, options: DoctorOptions) -> Finding:
    if port is None:
        return skipped("port", "needs a hotkey")
    if port.running:
        return ok("port", f"{port.number} on {options.host} is in use by a running node of this hotkey")
    if port.problem:
        return fail(
            "port", port.problem, f"--port with a free one; sudo ss -ltnp 'sport = :{port.number}' says who has it"
        )
    if options.port == 0:
        return warn(
            "port",
            "--port 0 takes another one at every start, and a firewall must know it",
            "--port 8091, or any fixed one",
        )
    return ok("port", f"{port.number} on {options.host} can be bound")


def check_address(answers: Sequence[Answer], why: str, options: DoctorOptions) -> Finding:
    """What would be published, against what peers saw. `why` nobody was asked, empty if somebody was."""
    announced = options.published
    seen = sorted({answer.called.source for answer in answers if answer.called is not None})
    if announced in seen:
        return ok("address", f"{announced} is announced, and peers see it too")
    remedy = f"--announce {seen[0]}" if seen else "--announce with this machine's public address"
    wrong = _unusable(announced, abroad=any(is_public(answer.ip) for answer in answers))
    if wrong and not options.announce and not seen and options.hotkey is None:
        return skipped("address", "needs --announce")
    if wrong:
        return fail("address", wrong, remedy)
    if seen:
        return warn(
            "address",
            f"{announced} is announced, and peers see this machine as {', '.join(seen)}: from outside nobody can tell "
            f"whether {announced} leads here",
            f"{remedy}, unless you know that {announced} leads here",
        )
    return skipped("address", f"{announced} is announced; whether it leads here: {why or 'no peer called back'}")


def _unusable(announced: str, *, abroad: bool) -> str:
    """Why nobody could use it, empty if somebody could. `abroad`: whether peers are on the public internet."""
    try:
        address = ipaddress.ip_address(announced)
    except ValueError:
        return f"{announced!r} is no IP address"
    if address.is_unspecified:
        return f"--announce is missing, and {announced} is no address that others could reach"
    if abroad and not is_public(announced):
        return f"{announced} is announced, an address of a private network"
    return ""


def check_reach(answers: Sequence[Answer], why: str, port: Port | None, options: DoctorOptions) -> Finding:
    """Whether the port is reached from outside. `why` nobody was asked, empty if somebody was."""
    if why or port is None:
        return skipped("reachable", why or "needs a port")
    called = {answer.uid: answer.called for answer in answers if answer.called is not None}
    through = {uid: reply for uid, reply in called.items() if reply.outcome is Outcome.ANSWERED}
    if through:
        best = min(through.values(), key=lambda reply: reply.seconds)
        found = f"yes: {_uids(through)} reached {best.source} port {port.number}, the first in {best.seconds:.2f} s"
        if len(through) == len(called):
            return ok("reachable", found)
        return warn(
            "reachable",
            f"{found}; {_uids(set(called) - set(through))} did not",
            "run this again; if it stays, look at the firewall",
        )
    if not called:
        return _unasked(answers)
    if all(reply.outcome is None for reply in called.values()):
        return fail(
            "reachable",
            f"{_uids(called)} see this machine as {min(reply.source for reply in called.values())}, a private address, "
            "and call none of those",
            "ask from the network that --announce is on (no VPN or proxy between)",
        )
    return _closed(called, port, options)


def _closed(called: dict[int, CalledBack], port: Port, options: DoctorOptions) -> Finding:
    source = min(reply.source for reply in called.values())
    outcomes = {reply.outcome for reply in called.values()}
    target = f"{source} port {port.number}"
    if Outcome.OTHER in outcomes:
        return fail(
            "reachable",
            f"no: something else answers at {target} ({_uids(called)} tried)",
            f"forward TCP {port.number} to this machine in the router, or choose another --port",
        )
    if Outcome.SILENT in outcomes:
        return fail(
            "reachable",
            f"no: connections to {target} get no answer ({_uids(called)} tried): a firewall, or a router that does not "
            "forward",
            f"sudo ufw allow {port.number}/tcp, and let TCP {port.number} in at the provider (security group, router)",
        )
    return fail(
        "reachable",
        f"no: {target} refuses connections ({_uids(called)} tried): it is not led to this process",
        f"in a container publish the port (docker run -p {port.number}:{port.number}) or give --port the one that the "
        f"provider maps{'; leave --host out' if options.host.startswith('127.') else ''}",
    )


def _unasked(answers: Sequence[Answer]) -> Finding:
    if (
        answers
        and all(answer.clock for answer in answers if answer.round_trip is not None)
        and any(answer.clock for answer in answers)
    ):
        return fail(
            "reachable",
            f"peers refuse this machine's signatures: {next(answer.problem for answer in answers if answer.clock)}",
            "sudo timedatectl set-ntp true",
        )
    said = "; ".join(f"uid {answer.uid}: {answer.problem}" for answer in answers[:3])
    later = (
        "; peers read the chain once a round: run this again in half an hour" if any(a.unknown for a in answers) else ""
    )
    return skipped("reachable", f"none of {len(answers)} peers called back ({said}){later}")


def check_round_trip(answers: Sequence[Answer], why: str) -> Finding:
    """Of connections to peers."""
    times = [answer.round_trip for answer in answers if answer.round_trip is not None]
    if not times:
        return skipped("round trip", why or "no peer could be connected to")
    middle = median(times)
    found = f"{1000 * middle:.1f} ms to {len(times)} peers (median; {1000 * min(times):.1f} to {1000 * max(times):.1f})"
    if middle > FAR:
        return warn("round trip", found, "a machine nearer to the others; VPNs and proxies off")
    return ok("round trip", found)


def _uids(uids: Sequence[int] | set[int] | dict[int, CalledBack]) -> str:
    return f"uid {', '.join(str(uid) for uid in sorted(uids))}"
