"""What the fork server imports before it forks nodes, first training step included.

The step runs on one thread: a process that has started a thread pool must not fork.
"""

from __future__ import annotations

import torch

import neurons.miner
import neurons.validator
from model.config import preset
from model.engine import StageEngine
from model.optimizer import OptimizerConfig
from model.recompute import Recompute
from model.split import split
from model.stage import build_stage

__all__ = ["neurons"]


def _first_step() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = preset("nano")
    plan = split(config, 1)[0]
    engine = StageEngine(
        build_stage(config, plan, 0),
        OptimizerConfig(kind="adamw", lr=1e-3),
        plan,
        n_total_params=1,
        accumulation=1,
        recompute=Recompute.KEEP,
        capacity=1,
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    engine.tail(0, tokens, tokens)
    engine.step()
    torch.set_num_threads(threads)


_first_step()
