"""Checks of the machine: software, cores, card, memory, open files, TCP."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from model.accounting import stage_flops
from model.devices import DEVICES
from model.relief import Holding
from model.split import StagePlan
from neurons.machine import Card
from neurons.needs import Needs, smaller_batch, stage_on
from scripts.doctor.report import Finding, fail, ok, skipped, warn
from subnet.manifest import Manifest
from subnet.metagraph import BLOCK_SECONDS
from subnet.quantities import written

CPU_FLOPS = 2e10
"""Of one core in fp32: what the matrix products of a stage reach, roughly."""
FEW_CORES = 2
OLDEST_CARD = (8, 0)
"""Compute capability with bf16 tensor cores."""
SECONDS_IN_FLIGHT = 0.2
"""A round trip that send and receive buffers should cover at the declared uplink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcp:
    """As /proc/sys/net/ipv4 has it; empty where it cannot be read."""

    default: str
    """Congestion control of sockets that ask for none."""
    allowed: tuple[str, ...]
    """What a process may ask for without root."""
    send: tuple[int, ...]
    """Bytes of a send buffer: least, first, most."""
    receive: tuple[int, ...]


def check_python(version: str, bounds: str | None) -> Finding:
    """`bounds` as in `requires-python`; None if the package's metadata has none."""
    if bounds is None or SpecifierSet(bounds).contains(version, prereleases=True):
        return ok("python", version + ("" if bounds is None else f" ({bounds})"))
    return fail("python", f"{version}, and this package needs {bounds}", "install Python 3.11 and make the venv anew")


def check_packages(requirements: Sequence[str] | None, installed: Callable[[str], str | None]) -> Finding:
    """`requirements` as the package's metadata has them; None if it is not installed. `installed` gives a version."""
    if requirements is None:
        return fail("packages", "orion-subnet is not installed in this Python", "pip install -e . (in the checkout)")
    wanted = [
        required
        for required in map(Requirement, requirements)
        if required.marker is None or required.marker.evaluate({"extra": ""})
    ]
    wrong: list[tuple[str, Requirement]] = []
    for required in wanted:
        version = installed(required.name)
        if version is None:
            wrong.append((f"{required.name} is missing", required))
        elif not required.specifier.contains(version, prereleases=True):
            wrong.append((f"{required.name} is {version}, needed {required.specifier}", required))
    if not wrong:
        return ok("packages", f"{len(wanted)} of {len(wanted)} within their bounds")
    names = " ".join(f'"{required.name}{required.specifier}"' for _, required in wrong)
    return fail("packages", "; ".join(words for words, _ in wrong), f"pip install {names}")


def check_cores(cores: float) -> Finding:
    if cores >= FEW_CORES:
        return ok("cpu", f"{cores:g} cores")
    return warn(
        "cpu", f"{cores:g} cores: network and compute share one", f"give the container {FEW_CORES} cores or more"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the largest stage computes."""

    plan: StagePlan
    unit_flops: float
    step_units: int
    """Microbatches in a local step."""
    round_seconds: float
    """For which a round trains."""

    @classmethod
    def of(cls, manifest: Manifest, plan: StagePlan) -> Work:
        forward, backward = stage_flops(manifest.model.config(), plan, tokens=manifest.data.sequence)
        return cls(
            plan=plan,
            unit_flops=float(manifest.tokens_per_microbatch * (forward + backward)),
            step_units=manifest.optimizer.accumulation,
            round_seconds=manifest.round.close * BLOCK_SECONDS,
        )

    def step_seconds(self, cores: float) -> float:
        """Of a local step on a CPU."""
        return self.step_units * self.unit_flops / (CPU_FLOPS * cores)


def check_card(
    card: Card | None, problem: str, *, driver: str, work: Work | None, cores: float, wanted: bool = True
) -> Finding:
    """
    Args:
        problem: why a card that is there cannot be used.
        work: of the largest stage; None without a manifest.
        wanted: False with --device cpu.
    """
    if problem:
        return fail("gpu", f"torch cannot use it: {problem}", "nvidia-smi (it shows whether the driver answers)")
    if card is not None:
        major, minor = card.capability
        found = (
            f"{card.name}, compute capability {major}.{minor}, {driver}, {down(card.free)} of "
            f"{written(card.memory)} free"
        )
        if card.capability < OLDEST_CARD:
            return warn("gpu", f"{found}: it has no bf16 tensor cores", "rent a card of capability 8.0 or newer")
        return ok("gpu", found)
    none = "torch sees none" if wanted else "none is used, as --device is cpu"
    if work is None:
        return warn("gpu", none, "--manifest, to learn whether the run needs one; nvidia-smi, if one is there")
    seconds = work.step_seconds(cores)
    found = (
        f"{none}; on {cores:g} cores a local step of stage {work.plan.index} takes some "
        f"{seconds:,.0f} s, and a round trains for {work.round_seconds:,.0f} s"
    )
    if seconds > work.round_seconds:
        return fail("gpu", found, "rent a machine with a GPU; if there is one: nvidia-smi, and a torch built for CUDA")
    return warn("gpu", f"{found}: enough", "nothing for this run; others need a GPU")


def check_card_memory(card: Card | None, manifest: Manifest | None, plan: StagePlan | None) -> Finding:
    """Of the stage that needs most."""
    if card is None:
        return skipped("gpu memory", "needs a GPU")
    if manifest is None or plan is None:
        return skipped("gpu memory", "needs --manifest")
    memory = stage_on(manifest, plan, card)
    parts = (
        f"weights {written(memory.weights)}, gradients {written(memory.gradients)}, optimizer "
        f"{written(memory.optimizer)}, in flight {written(memory.in_flight)}, workspace {written(memory.workspace)}"
    )
    found = f"stage {plan.index} needs {written(memory.total)} of {down(card.free)} free ({parts})"
    if memory.free >= 0:
        return ok("gpu memory", f"{found}, {Holding(memory.recompute, memory.graphs)}")
    return fail(
        "gpu memory", f"{found}, with full recompute", " or ".join(_more_memory(manifest, plan, card, memory.total))
    )


def _more_memory(manifest: Manifest, plan: StagePlan, card: Card, total: int) -> Iterator[str]:
    if total <= card.memory:
        yield "stop what else uses the card (nvidia-smi lists it)"
    larger = sorted((device for device in DEVICES.values() if device.memory >= total), key=lambda one: one.memory)
    if larger:
        yield f"rent {larger[0].name} or larger"
    batch = smaller_batch(manifest, plan, card)
    if batch is not None:
        yield f"join a run with data.batch {batch} or less"
    yield f"join a run with more than {plan.count} swarm.stages"


def check_memory(needs: Needs | None, free: int, *, held: Holding | None = None, ring: int) -> Finding:
    """Of the host, for a miner of the stage that needs most; `held` is what it would hold of open units."""
    if needs is None:
        return skipped("memory", f"{down(free)} free; how much is needed: needs --manifest")
    stage = "lies on the card" if needs.card is not None else f"takes {written(needs.weights)}"
    found = f"{down(free)} free; stage {needs.stage} {stage}, evidence {written(needs.ring)} or more"
    if needs.host > free:
        return fail(
            "memory",
            f"{found}: {written(needs.host - free)} short",
            f"a machine with {written(needs.host)} free or more",
        )
    if ring < needs.ring:
        return fail("memory", f"{found}, and --ring gives {written(ring)}", f"--ring {written(needs.ring)}")
    spare = free - (needs.host - needs.ring)
    if ring > spare:
        return warn("memory", f"{found}, and --ring may grow to {written(ring)}", f"--ring {down(spare)}")
    here = held is not None and needs.card is None
    return ok("memory", f"{found}, --ring {written(ring)}" + (f", {held}" if here else ""))


def check_validators_memory(needed: int | None, free: int) -> Finding:
    if needed is None:
        return skipped("memory", f"{down(free)} free; how much is needed: needs --manifest")
    found = f"{down(free)} free; a validator holds all stages: {written(needed)}"
    if needed > free:
        return fail(
            "memory", f"{found}, {written(needed - free)} short", f"a machine with {written(needed)} free or more"
        )
    return ok("memory", found)


def down(size: int) -> str:
    """A size as options take it, never more than `size`."""
    return f"{max(0, size) // 100_000_000 / 10:g}gb" if size >= 10**9 else f"{max(0, size) // 10**6}mb"


def check_files(soft: int, hard: int, *, least: int | None) -> Finding:
    """`least` is what the run takes; without a manifest what most take."""
    wanted = 1_024 if least is None else least
    found = f"{soft} open files allowed, {wanted} needed" + ("" if least is not None else " by most runs")
    if soft >= wanted:
        return ok("open files", found)
    if hard >= wanted:
        return fail(
            "open files", found, f"ulimit -n {min(hard, max(wanted, 65_536))} (in the shell that starts the node)"
        )
    return fail(
        "open files",
        f"{found}, and {hard} is the hard limit",
        "as root: a line `* - nofile 65536` in /etc/security/limits.conf and a new login; "
        "in a container: --ulimit nofile=65536",
    )


def check_tcp(tcp: Tcp) -> Finding:
    """Congestion control."""
    if not tcp.default:
        return skipped("tcp", "the kernel's settings cannot be read here (/proc/sys/net/ipv4)")
    if "bbr" in (tcp.default, *tcp.allowed):
        return ok("tcp", f"bbr can be used (default {tcp.default})")
    return warn(
        "tcp",
        f"{tcp.default}, and bbr is not available: a little loss on a long way halves the rate",
        "sudo modprobe tcp_bbr && sudo sysctl -w net.core.default_qdisc=fq net.ipv4.tcp_congestion_control=bbr",
    )


def check_buffers(tcp: Tcp, *, uplink: float) -> Finding:
    """What may be on its way. `uplink` is in bits per second."""
    if len(tcp.send) != 3 or len(tcp.receive) != 3:
        return skipped("tcp buffers", "the kernel's settings cannot be read here (/proc/sys/net/ipv4)")
    needed = uplink / 8 * SECONDS_IN_FLIGHT
    found = f"at most {written(tcp.send[2])} sent and {written(tcp.receive[2])} received on their way"
    if min(tcp.send[2], tcp.receive[2]) >= needed:
        return ok("tcp buffers", found)
    most = 1 << math.ceil(math.log2(max(2 * needed, 16 << 20)))
    return warn(
        "tcp buffers",
        f"{found}; {uplink / 1e6:g} Mbit/s over {1000 * SECONDS_IN_FLIGHT:g} ms takes {written(int(needed))}",
        f'sudo sysctl -w net.ipv4.tcp_wmem="4096 65536 {most}" net.ipv4.tcp_rmem="4096 131072 {most}"',
    )


def numbers(line: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", line))
