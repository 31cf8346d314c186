"""Which knobs to try next: at random, or by a model that learns from every trial."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EnvironmentProblem, InvalidOption
from ..schedules.fc_knobs import FcKnobs
from ..schedules.gather_gemm import Knobs
from ..schedules.sites import AnyKnobs
from ..schedules.winograd import WinogradKnobs
from .features import F32, MODEL, features
from .tasks import Task

BATCH = 8
EPSILON = 0.2  # share of a batch that is random, so that the model also sees what it does not like
FEW = 8  # trials that a model needs
BOOSTERS, ROUNDS = 4, 60
ALIKE = 2  # candidates of a batch that the model chose for the same tile: more would teach it little
WORST = -3.0  # score of a failed candidate: log2 of an eighth of the default's speed
METHODS = ("xgboost", "random")


def xgboost() -> Any:
    """Raises EnvironmentProblem."""
    try:
        import xgboost as package
    except ImportError:
        raise EnvironmentProblem(
            "tuning with a model needs XGBoost: pip install 'skimtvm[tune]', or --search random"
        ) from None
    return package


def _kind(knobs: AnyKnobs) -> object:
    """What candidates have in common that run at similar speed."""
    if isinstance(knobs, WinogradKnobs):
        return knobs.rows, knobs.vectors, knobs.together, knobs.segment
    if isinstance(knobs, FcKnobs):
        return knobs.window, knobs.ahead
    return knobs.vectors, knobs.lanes, knobs.aligned, knobs.unrolled


def _nearest(knobs: AnyKnobs, space: Sequence[AnyKnobs]) -> AnyKnobs | None:
    """The member of ``space`` most like ``knobs``, which won on a layer with other tiles and blocks; None without any."""
    if knobs in space:
        return knobs
    if isinstance(knobs, FcKnobs):
        return None
    mine = dataclasses.asdict(knobs)

    def apart(other: AnyKnobs) -> float:
        """How far tiles and blocks are from each other, and a little for all else."""
        theirs = dataclasses.asdict(other)
        ratios = (theirs[name] / mine[name] for name in ("vectors", "channel_block"))
        return sum(abs(math.log2(r)) for r in ratios) + 0.1 * sum(theirs[name] != mine[name] for name in mine)

    fixed = ("rows", "lanes", "aligned", "unrolled") if isinstance(knobs, Knobs) else ("rows", "lanes")
    same = [k for k in space if type(k) is type(knobs) and all(getattr(k, f) == getattr(knobs, f) for f in fixed)]
    return min(same, key=apart, default=None)


@dataclass
class Samples:
    """Trials of all tasks: what the model learns from. ``score``: log2 of the gain over the default."""

    x: list[F32] = field(default_factory=list)
    score: list[float] = field(default_factory=list)

    def add(self, row: F32, score: float) -> None:
        self.x.append(row)
        self.score.append(score)

    def __len__(self) -> int:
        return len(self.score)


class Model:
    """Gradient-boosted trees from features to scores: a few boosters, each of which sees a part of the trials and of the
    features at each step, so that they disagree about candidates unlike those that were tried."""

    def __init__(self, seed: int = 0) -> None:
        self.package, self.seed = xgboost(), seed
        self.boosters: list[Any] = []

    def fit(self, samples: Samples, weight: Sequence[float] | None = None) -> None:
        data = self.package.DMatrix(np.stack(samples.x), np.array(samples.score, np.float32), weight=weight)
        settings = {
            "max_depth": 4, "eta": 0.2, "min_child_weight": 1, "subsample": 0.7, "colsample_bytree": 0.6, "lambda": 0.5,
            "objective": "reg:squarederror", "nthread": 1, "verbosity": 0,
        }  # fmt: skip
        seeds = range(BOOSTERS * self.seed, BOOSTERS * (self.seed + 1))
        self.boosters = [self.package.train(settings | {"seed": seed}, data, num_boost_round=ROUNDS) for seed in seeds]

    def predict(self, x: F32) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and standard deviation of the boosters' scores."""
        data = self.package.DMatrix(x)
        scores = np.stack([booster.predict(data) for booster in self.boosters])
        return scores.mean(axis=0), scores.std(axis=0)


class Search:
    """Proposes candidates of one task. ``first``: knobs that won elsewhere, whose likes here are tried first; ``known``:
    knobs already measured -> score; ``samples``: of other tasks, extended in place by ``tell``."""

    def __init__(
        self,
        task: Task,
        method: str,
        *,
        seed: int = 0,
        first: Sequence[AnyKnobs] = (),
        known: Mapping[AnyKnobs, float] | None = None,
        samples: Samples | None = None,
    ) -> None:
        if method not in METHODS:
            raise InvalidOption(f"search '{method}' is unknown; choose {' or '.join(METHODS)}")
        self.task, self.method, self.seed = task, method, seed
        self.rng = np.random.default_rng(seed)
        self.default = task.site.default(task.target)
        space = [k for k in task.site.space(task.target, task.threads) if k != self.default]
        self.x = {k: row for k, row in zip(space, features(task, space), strict=True)}
        self.left = dict.fromkeys(space)
        self.samples = samples if samples is not None else Samples()
        self.own = 0
        self.predicted: dict[AnyKnobs, float] = {}
        self.queue = list(dict.fromkeys(near for k in first if (near := _nearest(k, space)) is not None))
        for knobs, score in (known or {}).items():
            self.tell(knobs, score)

    def tell(self, knobs: AnyKnobs, score: float) -> None:
        """A measured score; ``WORST`` for a failure."""
        self.left.pop(knobs, None)
        if knobs in self.x:
            self.samples.add(self.x[knobs], max(score, WORST))
            self.own += 1

    def ask(self, count: int = BATCH) -> list[AnyKnobs]:
        """Up to ``count`` candidates that have not been proposed; none when the space is exhausted."""
        chosen: list[AnyKnobs] = []

        def take(knobs: AnyKnobs) -> None:
            if knobs in self.left and len(chosen) < count:
                del self.left[knobs]
                chosen.append(knobs)

        if self.method == "random":
            return self._random(count, take, chosen)
        while self.queue and len(chosen) < max(1, count // 2):
            take(self.queue.pop(0))
        explore = max(1, round((EPSILON if len(self.samples) >= FEW else 0.5) * count))
        kinds: dict[object, int] = {}
        for knobs in self._ranked():
            if len(chosen) >= count - explore:
                break
            kind = _kind(knobs)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] <= ALIKE:
                take(knobs)
        return self._random(count, take, chosen)

    def _random(self, count: int, take: Any, chosen: list[AnyKnobs]) -> list[AnyKnobs]:
        rest = list(self.left)
        for i in self.rng.permutation(len(rest))[: count - len(chosen)]:
            take(rest[i])
        return chosen

    def _ranked(self) -> list[AnyKnobs]:
        """What is left, best first: by the model's score plus its doubt, or by the hand-made model of cycles before there
        are trials."""
        rest = list(self.left)
        if not rest:
            return []
        x = np.stack([self.x[k] for k in rest])
        if len(self.samples) < FEW:
            return [rest[i] for i in np.argsort(x[:, MODEL], kind="stable")]
        model = Model(self.seed)
        # Trials of this task count for more than those of others.
        weights = np.ones(len(self.samples), np.float32)
        if self.own:
            weights[-self.own :] = max(
                1.0, 2.0 * (len(self.samples) - self.own) / len(self.samples) / max(self.own, 1) * 8
            )
        model.fit(self.samples, weights.tolist())
        scores, doubt = model.predict(x)
        self.predicted = {k: float(s) for k, s in zip(rest, scores, strict=True)}
        return [rest[i] for i in np.argsort(-(scores + doubt), kind="stable")]
