"""Steers the strength of the penalties so that sparsity follows a schedule.

Sparsity answers to the weight decay slowly and differently in every network; one factor on the decay of all layers,
corrected every few steps, takes the search for the right decay away. Which layer becomes how sparse is still up to the
training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .pruner import Pruner
from .rules import Rule
from .schedules import Schedule, at

Array = npt.NDArray[Any]


class Dial(Schedule):
    """A value that is set from outside instead of following the step."""

    def __init__(self, value: float = 1.0) -> None:
        object.__setattr__(self, "value", value)

    def set(self, value: float) -> None:
        object.__setattr__(self, "value", value)


class Steering:
    """Turns ``dial``, which the rules of the layers ``names`` have as ``decay_factor``, every ``every`` steps.

    ``wanted``: sparsity of these layers together, over the steps of the pruner. ``gain``: change of the factor's
    logarithm for each correction and unit of error; ``damping``: for each unit of the error's change. ``limit``: largest
    factor either way; a penalty far stronger than the loss would kill the network before its sparsity is seen.
    """

    def __init__(
        self,
        pruner: Pruner,
        names: Sequence[str],
        dial: Dial,
        wanted: Schedule | float,
        *,
        every: int = 10,
        gain: float = 0.5,
        damping: float = 5.0,
        limit: float = 10.0,
    ) -> None:
        self.pruner, self.names, self.dial, self.wanted = pruner, list(names), dial, wanted
        self.every, self.gain, self.damping = every, gain, damping
        self._log, self._error, self._limit = math.log(dial.value), 0.0, math.log(limit)

    @staticmethod
    def rules(rules: Mapping[str, Rule], dial: Dial) -> dict[str, Rule]:
        """The rules with ``dial`` as their decay_factor."""
        return {pattern: dataclasses.replace(rule, decay_factor=dial) for pattern, rule in rules.items()}

    def sparsity(self) -> float:
        weights = [self.pruner.parameters[n] for n in self.names]
        total = sum(w.size for w in weights)
        return 1 - sum(int(np.count_nonzero(w)) for w in weights) / total if total else 0.0

    def update(self) -> None:
        """Call after every step."""
        if self.pruner.step % self.every:
            return
        error = at(self.wanted, self.pruner.step) - self.sparsity()
        self._log += min(max(self.gain * error + self.damping * (error - self._error), -0.2), 0.2)
        self._log = min(max(self._log, -self._limit), self._limit)
        self._error = error
        self.dial.set(math.exp(self._log))

    def state_dict(self) -> dict[str, Array]:
        return {"steering": np.array([self._log, self._error])}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        self._log, self._error = (float(v) for v in state["steering"])
        self.dial.set(math.exp(self._log))
