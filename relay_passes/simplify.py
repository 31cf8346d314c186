"""The simplification phase: all passes on one graph, round after round, until nothing changes."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ._utils import Graph, Rewriter, graph_pass
from .canonicalize import Canonicalize
from .channel_shuffle import ChannelShuffle
from .conv3d import Conv3d
from .dense_forms import DenseForms
from .dilated_conv import DilatedConv
from .find_norms import FindNorms
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_scale_shift import FoldScaleShift
from .lift_prim_calls import LiftPrimCalls
from .outline_lrn import OutlineLRN
from .simplify_noise import SimplifyNoise
from .to_nchw import ToNCHW
from .token_layout import TokenLayout
from .transposed_conv import TransposedConv

# The order inside a round: lifted calls and folded constants are what the others match; LRN and ChannelShuffle are
# known by shapes that the noise rules would respell; batch_norm folds before its neighbours move.
STAGES: tuple[Any, ...] = (
    LiftPrimCalls,
    FoldConstants,
    OutlineLRN,
    ChannelShuffle,
    SimplifyNoise,
    FindNorms,
    FoldBatchNorm,
    ToNCHW,
    FoldScaleShift,
    DenseForms,
    Canonicalize,
)


# Whether tokens run with channels outermost is decided when the rest has settled, and before dense layers lose their
# batch axes. Transposed, 3-D and widely dilated convolutions become others when normalisations have folded into their
# weights.
PHASES = (tuple(s for s in STAGES if s is not DenseForms), (TransposedConv, Conv3d, DilatedConv, TokenLayout), STAGES)


class _Simplify(Rewriter):
    """The stages of each phase in turn until a round changes nothing. ``counts``: rewrites by stage name."""

    max_rounds = 12

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def run(self, graph: Graph) -> None:
        self.counts = {}
        for phase in PHASES:
            self._settle(graph, [stage.rewriter() for stage in phase])

    def _settle(self, graph: Graph, stages: list[Any]) -> None:
        for _ in range(self.max_rounds):
            before = self.rewrites
            for stage in stages:
                stage.rewrites = 0
                stage.run(graph)
                self.rewrites += stage.rewrites
                if stage.rewrites:
                    name = type(stage).__name__.removeprefix("_")
                    self.counts[name] = self.counts.get(name, 0) + stage.rewrites
            if self.rewrites == before:
                return


Simplify = graph_pass("SkimSimplify")(_Simplify)


def simplify_passes() -> list[tvm.transform.Pass]:
    """The passes of the simplification phase, in order. Running them twice changes nothing more."""
    return [Simplify(), relax.transform.CanonicalizeBindings(), relax.transform.DeadCodeElimination(["main"])]
