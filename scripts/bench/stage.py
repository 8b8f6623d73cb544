"""What one pipeline stage does with its card: MFU, memory by part against the plan, what its boundary costs.

    python -m scripts.bench.stage                   # on a CUDA card: a middle stage of 100b, 8,192 tokens, bf16
    python -m scripts.bench.stage --scale 1/16      # on a CPU: every width and the tokens divided, fp32
    python -m scripts.bench.stage --quick           # what CI runs: fewer tokens still

The real engine with its optimizer runs forwards, backwards and a step with each recompute policy. MFU is that of
`model.accounting.FORMULA` for this stage alone: its forward and backward FLOPs per token, boundary matrices included,
times tokens, by the seconds of a unit (F + B + its share of the step) and the peak; HFU counts a second forward too.
The peak is the data sheet's on a card that `model.devices` knows, else that of the fastest of five matrix products.

Memory is measured while one unit waits and another runs backward, which is what `model.memory` plans for: on CUDA by
its allocator, on a CPU by counting live tensors (`storages`). Encode and decode are the boundary's own ends; the rest
of its way is measured on the host, with axon and dendrite over loopback in one process. Result: JSON on standard output
and in OUT/stage.json. Without a card the row `gpu` says that nothing was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from bittensor.sp_core import Keypair
from torch import Tensor, nn

from model.accounting import FORMULA, boundary_bytes, mfu, stage_flops, total_parameters
from model.config import BoundaryConfig, ConfigError, ModelConfig, preset
from model.devices import DEVICES, Device
from model.engine import StageEngine
from model.memory import StageMemory, Units, stage_memory
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import StagePlan, split
from model.stage import build_stage
from scripts.bench.report import report
from scripts.bench.storages import Storages
from scripts.bench.transport_ends import Done, Push, specs, take
from subnet.messages import WIRE_LIMIT
from subnet.transport.admission import Admission
from subnet.transport.axon import Axon
from subnet.transport.dendrite import Dendrite
from subnet.transport.synapse import require_finite, tensor_bytes
from subnet.trust.ledger import digest

ACCUMULATION = 64
"""Microbatches in a local step."""
OPTIMIZER = OptimizerConfig(kind="nadam", lr=1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What runs, and where."""

    config: ModelConfig
    plan: StagePlan
    tokens: int
    device: torch.device
    dtype: torch.dtype
    repeats: int

    def engine(self, recompute: Recompute) -> StageEngine:
        return StageEngine(
            build_stage(self.config, self.plan, 0, device=self.device, dtype=self.dtype),
            OPTIMIZER,
            self.plan,
            n_total_params=total_parameters(self.config, self.plan.count),
            accumulation=ACCUMULATION,
            recompute=recompute,
            capacity=2,
        )

    def boundary(self, seed: int) -> Tensor:
        """A tensor as it crosses: an input, or the gradient of an output."""
        shape = (1, self.tokens, self.config.boundary_width)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, self.dtype)


def scaled(config: ModelConfig, scale: Fraction) -> ModelConfig:
    """`config` with every width and the context multiplied by `scale`; layers and the 64-fold boundary stay."""

    def of(value: int) -> int:
        return max(1, int(value * scale))

    hidden = 2 * of(config.hidden // 2)
    heads = next(n for n in range(of(config.heads), 0, -1) if hidden % (2 * n) == 0)
    kv_heads = next(n for n in range(min(heads, of(config.kv_heads)), 0, -1) if heads % n == 0)
    return replace(
        config,
        vocab=of(config.vocab),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=of(config.ffn),
        context=of(config.context),
        boundary=BoundaryConfig(form=config.boundary.form, width=of(config.boundary.width)),
    )


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with what it left running on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_of(call: Callable[[], object], setting: Setting) -> float:
    call()
    return statistics.median(seconds_of(call, setting.device) for _ in range(setting.repeats))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of a unit's forward and backward and of a step, medians."""

    forward: float
    backward: float
    step: float

    @property
    def unit(self) -> float:
        return self.forward + self.backward + self.step / ACCUMULATION


def pace_of(setting: Setting, recompute: Recompute) -> Pace:
    """Units one by one; the first step and what comes before it warm up."""
    engine = setting.engine(recompute)
    x, g = setting.boundary(1), setting.boundary(2)
    forwards, backwards = [], []
    for number in range(setting.repeats + 1):
        forwards.append(seconds_of(lambda: engine.forward(0, x), setting.device))
        backwards.append(seconds_of(lambda: engine.backward(0, g), setting.device))
        if number == 0:
            engine.step()
    step = seconds_of(engine.step, setting.device)
    return Pace(forward=statistics.median(forwards[1:]), backward=statistics.median(backwards[1:]), step=step)


class Meter:
    """Bytes of tensors on a device, and the most of them since `restart`."""

    def __init__(self, device: torch.device, storages: Storages) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._storages = storages

    def held(self) -> int:
        return self._storages.bytes() if self._cuda is None else torch.cuda.memory_allocated(self._cuda)

    def restart(self) -> None:
        self._storages.peak = 0
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def peak(self) -> int:
        return self._storages.peak if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Only a CPU needs its tensors counted: doing so slows every operator down."""
    storages = Storages()
    if device.type == "cuda":
        yield Meter(device, storages)
    else:
        with storages:
            yield Meter(device, storages)


def memory_of(setting: Setting, recompute: Recompute) -> dict[str, int]:
    """Bytes by the parts of `StageMemory`, with one unit that waits and one that runs its backward."""
    with metered(setting.device) as meter:
        before = meter.held()
        engine = setting.engine(recompute)
        weights = meter.held() - before
        for number in range(2):  # gradients and moments come with the first unit and step, gradients again after it
            engine.forward(number, setting.boundary(1))
            engine.backward(number, setting.boundary(2))
            if number == 0:
                gradients = sum(p.grad.nbytes for p in engine.stage.parameters() if p.grad is not None)
                engine.step()
                optimizer = meter.held() - before - weights
        engine.forward("runs", setting.boundary(1))
        resident = meter.held()
        engine.forward("waits", setting.boundary(1))
        in_flight = meter.held() - resident
        g = setting.boundary(2)
        meter.restart()
        engine.backward("runs", g)
        peak = meter.peak() - before
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "in_flight": in_flight}
    return parts | {"workspace": peak - sum(parts.values())}


def plan_of(setting: Setting, recompute: Recompute, card: Device) -> StageMemory:
    """What the memory plan says of the same."""
    size = setting.dtype.itemsize
    units = Units(batch=1, sequence=setting.tokens, value_bytes=size, moment_bytes=size)
    graphs = 0 if recompute is Recompute.FULL else 1
    return stage_memory(setting.config, setting.plan, card, units, open_units=1, recompute=recompute, graphs=graphs)


def beside_plan(measured: dict[str, int], planned: StageMemory) -> dict[str, object]:
    """Part by part: measured, planned, their quotient."""
    rows: dict[str, object] = {}
    total = 0
    for part, count in measured.items():
        plan = int(getattr(planned, part))
        total += plan
        rows[part] = {"bytes": count, "planned": plan, "ratio": round(count / plan, 4)}
    all_of = sum(measured.values())
    return rows | {"total": {"bytes": all_of, "planned": total, "ratio": round(all_of / total, 4)}}


def boundary_of(setting: Setting) -> dict[str, float]:
    """Seconds of each leg of one boundary tensor's way from a residual to the next stage's first block."""
    config, plan = setting.config, setting.plan
    stage = build_stage(config, plan, 0, device=setting.device, dtype=setting.dtype)
    sender = _end(stage.boundaries, plan.last_layer, "sender")
    receiver = _end(stage.boundaries, plan.first_layer, "receiver")
    hidden = torch.randn(1, setting.tokens, config.hidden).to(setting.device, setting.dtype)
    wire = setting.boundary(1).to(torch.bfloat16).cpu()
    with torch.no_grad():
        encoded = sender(hidden, hidden)
        return {
            "encode": median_of(lambda: sender(hidden, hidden), setting),
            "to_wire": median_of(lambda: encoded.to(torch.bfloat16).cpu(), setting),
            "look_for_nonfinite": median_of(lambda: require_finite({"y": wire}, limit=WIRE_LIMIT), setting),
            "digest": median_of(lambda: digest(tensor_bytes(wire)), setting),
            "send_signed_and_receive_verified": asyncio.run(_push(wire, setting.repeats)),
            "from_wire": median_of(lambda: wire.to(setting.device, setting.dtype), setting),
            "decode": median_of(lambda: receiver(encoded), setting),
        }


def _end(boundaries: nn.ModuleDict, layer: int, name: str) -> nn.Module:
    ends = boundaries[str(layer)]
    assert isinstance(ends, nn.ModuleDict)  # noqa: S101 - what `Stage` builds
    return ends[name]


async def _push(wire: Tensor, repeats: int) -> float:
    """Seconds of one signed push of a tensor's bytes and its answer, both ends on this loop."""
    alice, bob = Keypair.create_from_uri("//Alice"), Keypair.create_from_uri("//Bob")
    values = wire.flatten().view(torch.float32)
    door = Admission(bob.ss58_address, allow=lambda _hotkey, _route: None, now_ns=time.time_ns, slots=2)
    axon = Axon(door, host="127.0.0.1")
    axon.serve(Push, take, specs=specs, max_bytes=2 * values.nbytes)
    await axon.start()
    taken = []
    async with Dendrite(alice, now_ns=time.time_ns) as dendrite:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            endpoint, push = f"http://127.0.0.1:{axon.port}", Push(count=values.numel())
            await dendrite.call(endpoint, bob.ss58_address, push, {"x": values}, reply=Done, deadline=30.0)
            taken.append(time.perf_counter() - start)
    await axon.stop()
    return statistics.median(taken[1:])


def peak_of(device: torch.device, dtype: torch.dtype, card: Device | None, *, side: int) -> tuple[float, str]:
    """FLOP/s at most, and whose word that is."""
    if card is not None:
        return card.peak, f"data sheet of {card.name}"
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(5))
    return 2 * side**3 / best, f"fastest of five products of {side} x {side} {dtype} on this machine"


def card_of(device: torch.device) -> Device | None:
    """The card of the table that torch names, if any."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    free = torch.cuda.get_device_properties(device).total_memory
    known = [card for card in DEVICES.values() if card.name.split("-")[0] in name.replace(" ", "")]
    return min(known, key=lambda card: abs(card.memory - free), default=None)


def measure(setting: Setting, policies: list[Recompute], *, side: int) -> dict[str, object]:
    """Everything, policy by policy, on one device."""
    card = card_of(setting.device)
    peak, source = peak_of(setting.device, setting.dtype, card, side=side)
    forward, backward = stage_flops(setting.config, setting.plan, tokens=setting.tokens)
    rows: dict[str, object] = {}
    legs = boundary_of(setting)
    for recompute in policies:
        pace = pace_of(setting, recompute)
        rate = setting.tokens / pace.unit
        again = forward if recompute is Recompute.FULL else 0
        rows[recompute.value] = {
            "forward_seconds": round(pace.forward, 5),
            "backward_seconds": round(pace.backward, 5),
            "step_seconds": round(pace.step, 5),
            "tokens_per_second": round(rate, 1),
            "mfu": round(mfu(rate, forward + backward, peak_flops=peak), 4),
            "hfu": round(mfu(rate, forward + backward + again, peak_flops=peak), 4),
            "memory": beside_plan(memory_of(setting, recompute), plan_of(setting, recompute, card or DEVICES["h100"])),
            "boundary_share": round(sum(legs.values()) / (pace.forward + pace.backward), 4),
        }
    return {
        "peak_flops": round(peak),
        "peak": source,
        "policies": rows,
        "boundary_seconds": {leg: round(taken, 6) for leg, taken in legs.items()},
        "boundary_bytes": boundary_bytes(setting.config, tokens=setting.tokens, itemsize=2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.stage", description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="100b", help="preset (default: 100b)")
    parser.add_argument("--stages", type=int, default=16, help="stages of the model; a middle one runs (default: 16)")
    parser.add_argument("--tokens", type=int, default=None, help="of a unit (default: the context)")
    parser.add_argument("--scale", type=Fraction, default=None, help="of widths and tokens (default: 1; 1/16 on a CPU)")
    parser.add_argument("--recompute", nargs="+", type=Recompute, default=list(Recompute), help="(default: all three)")
    parser.add_argument("--repeats", type=int, default=5, help="units timed with each policy (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--quick", action="store_true", help="half a minute, for CI: scale 1/32, two units each")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    scale = options.scale or (Fraction(1, 32) if options.quick else Fraction(1) if cuda else Fraction(1, 16))
    try:
        config = scaled(preset(options.model), scale)
        plan = split(config, options.stages)[(options.stages - 1) // 2]
    except ConfigError as error:
        parser.error(str(error))
    if plan.is_first or plan.is_last:
        parser.error(f"--stages is {options.stages}; only a middle stage has both boundaries: give at least 3")
    setting = Setting(
        config=config,
        plan=plan,
        tokens=options.tokens or config.context,
        device=torch.device("cuda" if cuda else "cpu"),
        dtype=torch.bfloat16 if cuda else torch.float32,
        repeats=2 if options.quick else options.repeats,
    )
    measured = measure(setting, options.recompute, side=4096 if cuda else 512 if options.quick else 1536)
    figures = {
        "torch": torch.__version__,
        "model": options.model,
        "scale": str(scale),
        "layers": plan.layers,
        "hidden": config.hidden,
        "tokens": setting.tokens,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "accumulation": ACCUMULATION,
        "formula": FORMULA,
        "gpu": torch.cuda.get_device_name() if cuda else "not measured yet",
        **measured,
    }
    report("stage", options.out, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
