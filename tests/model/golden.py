"""The run whose losses are committed: 200 steps of nano in two stages on tokens that every machine draws alike.

python -m tests.model.golden      # writes golden_curve.json anew: say in the commit what moved it, and why
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from model.accounting import total_parameters
from model.config import preset
from model.engine import StageEngine
from model.optimizer import nano_optimizer
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage

CURVE = Path(__file__).with_name("golden_curve.json")
STEPS = 200
EVERY = 20
"""Steps whose mean loss is one point."""
INNER = nano_optimizer()
"""What local runs of nano take. NAdam at its usual rate ends 3 % apart on two instruction sets of one processor."""
BATCH = 2
SEQUENCE = 64


def stream(count: int) -> Tensor:
    """int64 (count,) below 16: nine of ten tokens follow from the two before them by a table, others from nothing."""
    generator = torch.Generator().manual_seed(7)
    table = torch.randint(16, (16, 16), generator=generator).tolist()
    drawn = torch.randint(16, (count,), generator=generator).tolist()
    follows = (torch.randint(10, (count,), generator=generator) > 0).tolist()
    tokens = [1, 2]
    for own, following in zip(drawn, follows, strict=True):
        tokens.append(table[tokens[-2]][tokens[-1]] if following else own)
    return torch.tensor(tokens[:count])


def curve() -> list[float]:
    """Mean training losses of each `EVERY` steps, nats per token."""
    config = preset("nano")
    plans = split(config, 2)
    head, tail = (
        StageEngine(
            build_stage(config, plan, 1),
            INNER,
            plan,
            n_total_params=total_parameters(config, 2),
            accumulation=1,
            recompute=Recompute.KEEP,
            capacity=1,
        )
        for plan in plans
    )
    rows = stream(STEPS * BATCH * (SEQUENCE + 1)).view(STEPS, BATCH, SEQUENCE + 1)
    losses = []
    for number, row in enumerate(rows):
        tokens, targets = row[:, :-1], row[:, 1:]
        loss, g = tail.tail(number, head.forward(number, tokens), targets, tokens)
        assert g is not None
        head.backward(number, g)
        head.step()
        tail.step()
        losses.append(loss)
    points = torch.tensor(losses, dtype=torch.float64).view(-1, EVERY).mean(1)
    return [round(float(point), 5) for point in points]


if __name__ == "__main__":
    CURVE.write_text(json.dumps(curve()) + "\n")
