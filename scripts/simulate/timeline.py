"""What is kept of a simulation to be drawn: how busy rows are in slices of time, and every unit of a short while."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.simulate.accounts import Timeline
from scripts.simulate.replica import Replica

SLICES = 240
ROWS = 64
"""More replicas than that share one row per stage."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work in the close-up."""

    row: int
    start: float
    end: float
    backward: bool


@dataclass(frozen=True, slots=True)
class Vacancy:
    """A place without a working replica."""

    row: int
    start: float
    end: float


class Recorder(Timeline):
    """Keeps a whole simulation of `seconds`, and its units from `close_up` on."""

    def __init__(self, *, stages: int, replicas: int, seconds: float, close_up: tuple[float, float]) -> None:
        self.stages, self.replicas, self.seconds, self.close_up = stages, replicas, seconds, close_up
        self.by_stage = stages * replicas > ROWS
        """Whether a row is a stage, else it is a replica."""
        self.rows = stages if self.by_stage else stages * replicas
        self.units: list[Unit] = []
        self.vacancies: list[Vacancy] = []
        self._width = seconds / SLICES
        self._busy = [[0.0] * SLICES for _ in range(self.rows)]

    @property
    def busy(self) -> NDArray[np.float64]:
        """Share of each slice (rows, SLICES) in which a row's replicas compute, 0 to 1."""
        each = self.replicas if self.by_stage else 1
        return np.asarray(self._busy) / (self._width * each)

    def worked(self, replica: Replica, *, forward: tuple[float, float] | None, backward: tuple[float, float]) -> None:
        row = self._row(replica.stage, replica.place)
        start, end = backward if forward is None else (forward[0], max(forward[1], backward[1]))
        self._add(self._busy[row], start, end)
        if end <= self.close_up[0] or start >= self.close_up[1]:
            return
        if self.by_stage and replica.place:
            return  # one replica stands for its stage
        if forward is not None:
            self.units.append(Unit(row, *forward, backward=False))
        if backward[1] > backward[0]:
            self.units.append(Unit(row, *backward, backward=True))

    def vacant(self, stage: int, place: int, start: float, end: float) -> None:
        self.vacancies.append(Vacancy(self._row(stage, place), start, end))

    def _row(self, stage: int, place: int) -> int:
        return stage if self.by_stage else stage * self.replicas + place

    def _add(self, row: list[float], start: float, end: float) -> None:
        width = self._width
        first, last = int(start / width), min(int(end / width), SLICES - 1)
        if first >= last:
            row[min(first, SLICES - 1)] += end - start
            return
        row[first] += (first + 1) * width - start
        for between in range(first + 1, last):
            row[between] += width
        row[last] += end - last * width
