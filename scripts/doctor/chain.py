"""Checks of the chain, of the clock against it, and of the hotkey's place on it."""

from __future__ import annotations

from dataclasses import dataclass

from bittensor.http_auth import DEFAULT_ALLOWED_SKEW

from scripts.doctor.options import DoctorOptions
from scripts.doctor.report import Finding, fail, ok, skipped, warn
from subnet.metagraph import ChainState, Neuron
from subnet.swarm.record import Record
from subnet.transport.protocol import PROTOCOL, common, package_version

GENESIS = {"finney": "0x2f0555cc76fc2840a25a6ea3b9637146806f1f44b090c175ffde2a7e5ab36c03"}
"""Of networks that have a name."""
LATE = 4.0
"""Seconds after its time by which a new block has come, been noticed and been read."""
BEHIND = DEFAULT_ALLOWED_SKEW
"""Seconds: axons refuse what is signed further in the future, so who is this far behind refuses others."""
SLOW = 5.0
"""Seconds to connect after which a node would be late for deadlines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnChain:
    """What was read of a chain."""

    seconds: float
    """To connect and read the head."""
    genesis: str
    state: ChainState
    immunity: int
    """Blocks."""
    ahead: float | None
    """Seconds from a new block's timestamp to its arrival, by this machine's clock; None if no new block came."""
    waited: float
    """Seconds for it."""
    space_limit: int | None = None
    """Bytes that the chain takes from the hotkey in an epoch; None if there was no hotkey to ask for."""


def check_chain(chain: OnChain | None, problem: str, options: DoctorOptions) -> Finding:
    """`problem`: why there is no chain."""
    if chain is None:
        return fail("chain", problem, "another --network (finney, test, ws://…), or let outgoing TCP to it pass")
    head = chain.state.head
    found = (
        f"{options.network}: connected in {chain.seconds:.1f} s, finalized block {head.number}, genesis "
        f"{chain.genesis[:10]}…"
    )
    known = GENESIS.get(options.network)
    if known is not None and known != chain.genesis:
        return fail(
            "chain", f"{found}, which is not the genesis of {options.network} ({known[:10]}…)", "--network finney"
        )
    if chain.ahead is None:
        return fail(
            "chain", f"{found}, and no new block in {chain.waited:.0f} s", "another --network: this node stands still"
        )
    if chain.seconds > SLOW:
        return warn("chain", found, "a --network nearer by: ws://… of a node of your own")
    return ok("chain", found)


def check_subnet(chain: OnChain | None, problem: str, options: DoctorOptions) -> Finding:
    """`problem`: what is wrong with the subnet, where the chain could be reached."""
    if problem:
        return fail("subnet", problem, "--netuid with the subnet's number: btcli subnets list -n " + options.network)
    if chain is None:
        return skipped("subnet", "needs the chain")
    state = chain.state
    permits = sum(neuron.validator_permit for neuron in state.neurons)
    return ok("subnet", f"netuid {state.netuid}: {len(state.neurons)} neurons, {permits} with a validator permit")


def check_clock(chain: OnChain | None) -> Finding:
    if chain is None or chain.ahead is None:
        return skipped("clock", "needs a chain that makes blocks")
    fix = "sudo timedatectl set-ntp true (or: sudo chronyc makestep); in a container, on its host"
    if chain.ahead < -BEHIND:
        return fail("clock", f"{-chain.ahead:.1f} s or more behind the chain's; peers allow {BEHIND:g} s", fix)
    if chain.ahead > LATE + BEHIND:
        late = f"a new block arrived {chain.ahead:.1f} s after its own time, at most {LATE + BEHIND:g} s are expected"
        return fail("clock", f"{late}: the clock is ahead by some {chain.ahead - LATE / 2:.0f} s", fix)
    return ok("clock", f"a new block arrived {chain.ahead:.1f} s after its own time, by this machine's clock")


def check_protocol(chain: OnChain | None) -> Finding:
    """Whether nodes with a record on this subnet, of whatever run, announce a version of the protocol spoken here."""
    if chain is None:
        return skipped("protocol", "needs the chain")
    nodes = [one for one in chain.state.neurons if one.endpoint is not None and Record.decode(one.record) is not None]
    others = sorted(one.protocol for one in nodes if common(one.protocol) is None)
    if not nodes:
        return skipped("protocol", f"{PROTOCOL} is spoken here; no node of Orion serves on this subnet")
    if not others:
        return ok("protocol", f"{PROTOCOL} is spoken here, and by all {len(nodes)} nodes of Orion on this subnet")
    found = f"{PROTOCOL} is spoken here, and not by {len(others)} of {len(nodes)} nodes, which announce "
    newer = others[-1] > PROTOCOL
    return warn(
        "protocol",
        found + ", ".join(map(str, sorted(set(others)))),
        f"upgrade Orion {package_version()} on this machine" if newer else "",
    )


def check_registration(chain: OnChain | None, hotkey: str | None, options: DoctorOptions) -> Finding:
    if chain is None or hotkey is None:
        missing = [name for name, value in (("the chain", chain), ("a hotkey", hotkey)) if value is None]
        return skipped("registration", f"needs {' and '.join(missing)}")
    neuron = chain.state.by_hotkey(hotkey)
    if neuron is None:
        return fail(
            "registration",
            f"hotkey {hotkey} is not registered on netuid {options.netuid}",
            f"btcli subnets register --netuid {options.netuid} {options.keys_given} -n {options.network} "
            "(from where the coldkey is; it costs TAO: docs/register.md)",
        )
    left = neuron.registered_at + chain.immunity - chain.state.head.number
    found = f"uid {neuron.uid}, registered at block {neuron.registered_at}, stake {neuron.stake:,.1f}, " + (
        f"immune for {left} blocks more" if left > 0 else f"immunity of {chain.immunity} blocks is over"
    )
    if options.role == "validator":
        return _permit(neuron, found, options)
    if left <= 0 and neuron.incentive == 0:
        return warn(
            "registration", f"{found} and it earns nothing: any newcomer may take its place", "start the miner now"
        )
    return ok("registration", f"{found}, incentive {neuron.incentive:.4f}")


def _permit(neuron: Neuron, found: str, options: DoctorOptions) -> Finding:
    if neuron.validator_permit:
        return ok("registration", f"{found}, validator permit")
    return fail(
        "registration",
        f"{found}, no validator permit: the subnet gives them to most stake, at the end of a tempo",
        f"btcli stake add --netuid {options.netuid} --amount TAO {options.keys_given} -n {options.network} "
        "(from where the coldkey is)",
    )
