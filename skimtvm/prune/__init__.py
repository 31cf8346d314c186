"""Prune while training: regularizers, thresholds, masks, schedules and a solver, on NumPy arrays.

Needs neither TVM nor a training framework. Names are resolved on first use:
``skimtvm.prune.torch`` is the adaptor to PyTorch, ``skimtvm.prune.guide`` projects what pruning a layer is worth,
``skimtvm.prune.oneshot`` prunes ONNX files, ``skimtvm.prune.demo`` trains a small network from end to end.
"""

from __future__ import annotations

from .groups import Blocks, Channels, Columns, Elements, Filters
from .masks import GroupwiseMask, Mask, NofM
from .native import WinogradConv2d
from .pruner import Pruner, TrainingDiverged
from .regularizers import ISTA, L1, L2, GroupLasso, L1Surgery, Regularizer, Sum, WinogradL1
from .rules import Rule
from .schedules import Constant, Cosine, PolynomialRamp, Schedule, Steps, ramp_to_sparsity
from .solver import SGD
from .thresholds import GradientAdjusted, Threshold, WinogradAdjusted, WinogradProjection

__all__ = [
    "ISTA",
    "L1",
    "L2",
    "SGD",
    "Blocks",
    "Channels",
    "Columns",
    "Constant",
    "Cosine",
    "Elements",
    "Filters",
    "GradientAdjusted",
    "GroupLasso",
    "GroupwiseMask",
    "L1Surgery",
    "Mask",
    "NofM",
    "PolynomialRamp",
    "Pruner",
    "Regularizer",
    "Rule",
    "Schedule",
    "Steps",
    "Sum",
    "Threshold",
    "TrainingDiverged",
    "WinogradAdjusted",
    "WinogradConv2d",
    "WinogradL1",
    "WinogradProjection",
    "ramp_to_sparsity",
]
