"""Values that change over the steps of a training run: learning rates, target sparsities, strengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidOption
from .masks import check_sparsity


@dataclass(frozen=True)
class Schedule:
    """The same ``value`` at every step."""

    value: float

    def at(self, step: int) -> float:
        return self.value


Constant = Schedule


@dataclass(frozen=True)
class PolynomialRamp(Schedule):
    """From ``start`` at step ``begin`` to ``value`` at step ``end``, fast first:
    value + (start - value) * (1 - (step - begin) / (end - begin)) ** power (Zhu & Gupta 2017). Raises InvalidOption."""

    start: float = 0.0
    begin: int = 0
    end: int = 1
    power: float = 3.0

    def __post_init__(self) -> None:
        if not (0 <= self.begin < self.end and self.power > 0):
            raise InvalidOption(
                f"ramp from step {self.begin} to {self.end}, power {self.power}: needs 0 <= begin < end"
            )

    def at(self, step: int) -> float:
        left = 1 - min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.value + (self.start - self.value) * left**self.power


def ramp_to_sparsity(target: float, *, begin: int, end: int, start: float = 0.0, power: float = 3.0) -> PolynomialRamp:
    """A ramp of sparsity. Raises InvalidOption for sparsities outside of [0, 1)."""
    return PolynomialRamp(check_sparsity(target), check_sparsity(start), begin, end, power)


@dataclass(frozen=True)
class Steps(Schedule):
    """value * gamma ** (number of ``at_steps`` that are over): the seed's multistep policy."""

    gamma: float = 0.1
    at_steps: tuple[int, ...] = ()

    def at(self, step: int) -> float:
        return float(self.value * self.gamma ** sum(step >= s for s in self.at_steps))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``value`` at step 0 to ``low`` at step ``total``, after a linear rise over ``warmup`` steps."""

    total: int = 1
    low: float = 0.0
    warmup: int = 0

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.value * (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return self.low + (self.value - self.low) * (1 + math.cos(math.pi * done)) / 2


def at(value: Schedule | float, step: int) -> float:
    """The value of a schedule, or of a plain number."""
    return value.at(step) if isinstance(value, Schedule) else value
