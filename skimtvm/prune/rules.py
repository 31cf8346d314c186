"""What happens to which layer: a Rule for every pattern of layer names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from .masks import Mask, check_sparsity
from .regularizers import Regularizer
from .schedules import Schedule
from .thresholds import Threshold

T = TypeVar("T")
_SUFFIX = ".weight"


@dataclass(frozen=True)
class Rule:
    """How one layer is trained and pruned.

    ``regularizer``: penalty on its weights; ``decay_factor`` multiplies its strength, over time if a Schedule.
    ``threshold``: zeroes small weights after each update; they may come back.
    ``mask``: a Mask (taken from the weights at the start) or an array; masked weights stay exactly 0.
    ``sparsity``: share of zeros (or of groups) that the mask is brought to, over time if a Schedule; looked at every
    ``every`` steps. ``lr_mult``: factor on the learning rate, a number or an array that broadcasts to the weight.
    Raises InvalidOption for combinations that make no sense.
    """

    regularizer: Regularizer | None = None
    threshold: Threshold | None = None
    mask: Mask | npt.NDArray[Any] | None = None
    sparsity: Schedule | float | None = None
    every: int = 1
    lr_mult: float | npt.NDArray[Any] = 1.0
    decay_factor: Schedule | float = field(default=1.0)

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            value = self.sparsity.value if isinstance(self.sparsity, Schedule) else self.sparsity
            check_sparsity(value, "target sparsity")
            if isinstance(self.mask, np.ndarray):
                raise InvalidOption("a mask given as an array is fixed; leave the target sparsity out, or give a Mask")
        if self.every < 1:
            raise InvalidOption(f"rule: every is {self.every}; give a whole number of steps from 1")
        if self.regularizer is not None and self.regularizer.copies and self.threshold is None:
            raise InvalidOption("L1Surgery keeps an unthresholded copy, so it needs a threshold; add one to the rule")


def layer_name(parameter: str) -> str:
    """``conv1`` for ``conv1.weight``: what patterns see."""
    return parameter.removesuffix(_SUFFIX)


def matching(names: Iterable[str], pattern: str, *, what: str = "layer") -> list[str]:
    """The names that fit the fnmatch ``pattern``, as they are or without ``.weight``. Raises InvalidOption if none."""
    known = list(names)
    found = [n for n in known if fnmatchcase(n, pattern) or fnmatchcase(layer_name(n), pattern)]
    if not found:
        listed = ", ".join(sorted(map(layer_name, known))) or "none"
        raise InvalidOption(f"{what} pattern '{pattern}' matches nothing; there are: {listed}")
    return found


def assign(parameters: Mapping[str, npt.NDArray[Any]], rules: Mapping[str, T]) -> dict[str, T]:
    """The rule of each parameter; the first pattern that fits wins.

    Patterns are for weights (two dimensions or more); biases and scales are only meant by their full name, or by a
    pattern that ends in it (``*.bias``). Raises InvalidOption for a pattern without a layer, listing what exists.
    """
    weights = [n for n, array in parameters.items() if array.ndim >= 2]
    out: dict[str, T] = {}
    for pattern, rule in rules.items():
        names = weights
        last = pattern.rpartition(".")[2]
        if pattern in parameters or (last not in ("", "*") and any(n.rpartition(".")[2] == last for n in parameters)):
            names = list(parameters)
        for name in matching(names, pattern):
            out.setdefault(name, rule)
    return out
