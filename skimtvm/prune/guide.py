"""Guided pruning: prune the layers that become faster by it, as far as they become faster, and no others.

The projection of a layer with density x, dense FLOPs C, F FLOP/s of the machine on dense layers, bytes of activations
S_A and weights S_W, memory bandwidth B:

    t_dense = max(C / F, (S_A + S_W) / B),   t_sparse = max(alpha x C / F, (S_A + beta x S_W) / B)

alpha is how much longer the sparse kernel takes for a multiply-add (1 / alpha is the break-even density), beta about 2
for an index beside each value. SkimCaffe's model has t_dense = C / F; the bytes count for fully connected layers at batch 1.

With the measured table of a machine (``skimtvm calibrate``) F, B and alpha are those of the layer's own shape, and t_dense
is that of the fastest dense kernel: where Winograd's is much faster than the direct one, a layer must lose more weights
before zeros pay.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration import Calibration, for_host
from ..errors import InvalidOption
from ..workload import ConvWorkload, DenseWorkload
from .groups import ELEMENTS, Elements
from .masks import Mask, check_sparsity
from .pruner import Pruner, zeros
from .rules import Rule, layer_name

Array = npt.NDArray[Any]
Workload = ConvWorkload | DenseWorkload
# One core of a Zen 4 server: what kernels reach there. Ratios matter, so it is a fair model of others too.
DEFAULT_ALPHA = {"csr": 1.8, "bsr4": 1.15, "bsr8": 1.1, "bsr16": 1.1}
_AT_CEILING = 1.01  # a mask at exactly this density may be a weight above it
DEFAULT_FLOPS, DEFAULT_BANDWIDTH, DEFAULT_BETA = 117e9, 50e9, 2.0


@dataclass(frozen=True)
class Machine:
    """``alpha``: by layer name or pattern, or by kernel (csr, bsr4, ...); layers win over kernels.

    ``flops``: dense FLOP/s; ``bandwidth``: bytes a second; ``beta``: bytes of a stored weight over those of a dense one;
    ``table``: measured, for the layers that ``alpha`` does not name.
    Raises InvalidOption for numbers that make no sense.
    """

    alpha: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_ALPHA))
    flops: float = DEFAULT_FLOPS
    bandwidth: float = DEFAULT_BANDWIDTH
    beta: float = DEFAULT_BETA
    table: Calibration | None = None

    def __post_init__(self) -> None:
        for name, value in {**self.alpha, "flops": self.flops, "bandwidth": self.bandwidth, "beta": self.beta}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and value > 0):
                raise InvalidOption(f"alpha table: '{name}' is {value!r}; give a number above 0")

    @staticmethod
    def load(source: Mapping[str, Any] | str | Path | None) -> Machine:
        """From a mapping or JSON file: alpha by layer or kernel, plus optional flops, bandwidth and beta; the table of
        ``skimtvm calibrate``; or the JSON of ``skimtvm bench --layers``, of which the medians count. None: the table of
        this machine that comes with the package, else the built-in model."""
        if source is None:
            return Machine(table=for_host())
        raw: Any = source
        if isinstance(source, str | Path):
            try:
                raw = json.loads(Path(source).read_text())
            except (OSError, ValueError) as e:
                raise InvalidOption(f"alpha table '{source}' cannot be read as JSON: {e}") from None
        if not isinstance(raw, Mapping):
            raise InvalidOption("alpha table: give an object of layer or kernel: alpha")
        if isinstance(raw.get("points"), list):
            try:
                return Machine(table=Calibration.from_json(raw))
            except ValueError as e:
                raise InvalidOption(f"alpha table: the calibration cannot be used: {e}; make it again") from None
        if isinstance(raw.get("layers"), list) and "schema" in raw:
            raw = _measured(raw["layers"])
        numbers = {k: raw[k] for k in ("flops", "bandwidth", "beta") if k in raw}
        alpha = raw.get("alpha", {k: v for k, v in raw.items() if k not in numbers})
        if not isinstance(alpha, Mapping):
            raise InvalidOption("alpha table: 'alpha' must be an object of layer or kernel: alpha")
        return Machine({**DEFAULT_ALPHA, **alpha}, **numbers)

    def record(self) -> dict[str, Any]:
        """What ``load`` makes the same machine of."""
        if self.table is not None:
            return json.loads(self.table.to_json())  # type: ignore[no-any-return]
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "table"}

    def rates(self, layer: str, kernel: str, work: Workload) -> tuple[float, float, float, float]:
        """(alpha, FLOP/s of the direct dense kernel, bytes a second, seconds of the fastest dense kernel) of a layer; the
        last is 0 where it is not measured."""
        named = layer in self.alpha or any(p not in DEFAULT_ALPHA and fnmatchcase(layer, p) for p in self.alpha)
        alpha = self.table.alpha(kernel, work) if self.table is not None and not named else None
        if self.table is None or alpha is None:
            return self.alpha_of(layer, kernel), self.flops, self.bandwidth, 0.0
        direct, fastest = self.table.dense_seconds(work)
        return alpha, 2 * work.macs / direct, self.table.bandwidth(sum(_bytes(work))), fastest

    def alpha_of(self, layer: str, kernel: str = "csr") -> float:
        """Raises InvalidOption for a kernel without alpha."""
        if layer in self.alpha:
            return self.alpha[layer]
        for pattern, value in self.alpha.items():
            if pattern not in DEFAULT_ALPHA and pattern != kernel and fnmatchcase(layer, pattern):
                return value
        if kernel not in self.alpha:
            raise InvalidOption(f"alpha table: no alpha for kernel '{kernel}'; it has {', '.join(self.alpha)}")
        return self.alpha[kernel]


def _measured(rows: Sequence[Any]) -> dict[str, Any]:
    """Medians over the rows of a benchmark of single layers: alpha by kernel, rates of the machine."""
    sparse = [r for r in rows if isinstance(r, dict) and r.get("alpha") and r.get("kernel_name") != "dense"]
    if not sparse:
        raise InvalidOption("alpha table: the benchmark has no sparse layers; run skimtvm bench --layers first")
    try:
        kernels = {k: [r["alpha"] for r in sparse if r["kernel_name"] == k] for k in {r["kernel_name"] for r in sparse}}
        return {
            "alpha": {kernel: statistics.median(values) for kernel, values in sorted(kernels.items())},
            "flops": 1e9 * statistics.median(r["macs"] * 2e-6 / r["dense"]["median_ms"] for r in sparse if r["dense"]),
            "bandwidth": 1e9 * statistics.median(r["bandwidth_gbs"] for r in sparse),
        }
    except (KeyError, TypeError, statistics.StatisticsError) as e:
        raise InvalidOption(f"alpha table: the benchmark's rows cannot be read ({e}); run it again") from None


@dataclass(frozen=True)
class Projection:
    """What pruning a layer is worth. Times in seconds.

    ``break_even``: density below which sparse is faster; ``ceiling``: density below which the memory bounds the layer,
    so that more zeros gain nothing (0 if it never does); ``target``: density to prune to, 1 for a layer to leave dense.
    """

    layer: str
    density: float
    dense_time: float
    sparse_time: float
    break_even: float
    ceiling: float
    target: float
    worth: bool
    reason: str

    @property
    def speedup(self) -> float:
        return self.dense_time / self.sparse_time if self.sparse_time else math.inf

    @property
    def done(self) -> bool:
        """Whether more zeros gain nothing."""
        return self.density <= _AT_CEILING * self.ceiling


class Guide:
    """Projects the layers of ``workloads`` (name -> ConvWorkload or DenseWorkload) on a machine.

    ``alphas``: the machine (see Machine.load), by default this one. ``kernel``: the
    kernel that pruning is for (csr, bsr4, ...). ``reach``: the lowest density that training is thought to reach: a layer
    that would not be faster by ``gain`` even there is not worth it.
    """

    def __init__(
        self,
        workloads: Mapping[str, Workload],
        alphas: Mapping[str, Any] | str | Path | Machine | None = None,
        *,
        kernel: str = "csr",
        reach: float = 0.05,
        gain: float = 1.05,
    ) -> None:
        check_sparsity(1 - reach, "1 - reach")
        self.workloads = dict(workloads)
        self.machine = alphas if isinstance(alphas, Machine) else Machine.load(alphas)
        self.kernel, self.reach, self.gain = kernel, reach, gain

    def project(self, name: str, density: float = 1.0) -> Projection:
        """The layer at ``density``. Raises InvalidOption for a layer without workload."""
        if name not in self.workloads:
            raise InvalidOption(f"layer '{name}' has no workload; there are: {', '.join(self.workloads) or 'none'}")
        work, m = self.workloads[name], self.machine
        alpha, flops, bandwidth, fastest = m.rates(name, self.kernel, work)
        activations, weights = _bytes(work)
        compute = 2 * work.macs / flops
        dense = fastest or max(compute, (activations + weights) / bandwidth)

        def time(x: float) -> float:
            return max(alpha * x * compute, (activations + m.beta * x * weights) / bandwidth)

        # alpha x C / F falls below the memory's time at the ceiling; both are linear in x.
        slope = alpha * compute - m.beta * weights / bandwidth
        floor = activations / bandwidth
        ceiling = min(floor / slope, 1.0) if slope > 0 else 1.0
        memory_even = (dense * bandwidth - activations) / (m.beta * weights)
        even = min(max(min(dense / (alpha * compute), memory_even), 0.0), 1.0)
        # Where memory bounds the layer at every density, fewer weights are still fewer bytes: no ceiling then.
        target = self.reach if slope <= 0 else max(self.reach, ceiling)
        best = dense / time(target)
        worth = best >= self.gain
        sparse = time(density)
        if not worth:
            reason = f"leave dense: {best:.2f}x even at density {target:.3f} (break-even {even:.2f})"
        elif density > even:
            reason = f"prune to {target:.3f}: {dense / sparse:.2f}x now, {best:.1f}x there; break-even {even:.2f}"
        elif slope > 0 and density <= _AT_CEILING * ceiling:
            reason = f"stop: {dense / sparse:.1f}x, bound by memory below density {ceiling:.3f}"
        else:
            reason = f"prune on to {target:.3f}: {dense / sparse:.1f}x now, {best:.1f}x there"
        return Projection(name, density, dense, sparse, even, ceiling if slope > 0 else 0.0, target if worth else 1.0,
                          worth, reason)  # fmt: skip

    def plan(self, densities: Mapping[str, float] | None = None) -> dict[str, Projection]:
        """Every layer, at its density (1 where none is given)."""
        return {name: self.project(name, (densities or {}).get(name, 1.0)) for name in self.workloads}

    def network(self, densities: Mapping[str, float]) -> float:
        """Projected speed-up of all layers together, each by its faster kernel."""
        rows = self.plan(densities).values()
        total = sum(min(p.dense_time, p.sparse_time) for p in rows)
        return sum(p.dense_time for p in rows) / total if total else 1.0


def _bytes(work: Workload) -> tuple[int, int]:
    """Bytes of activations (in and out) and of dense float32 weights."""
    if isinstance(work, DenseWorkload):
        return 4 * work.m * (work.k + work.n), 4 * work.k * work.n
    n, k, h, w = work.out_shape
    return 4 * (work.n * work.c * work.h * work.w + n * k * h * w), 4 * work.k * work.row_length


class GuidedPruning:
    """Drives a Pruner by a Guide: at the start layers that are not worth it are left dense; later layers past their
    ceiling stop, and layers that have settled above break-even get their dense weights back.

    Call ``update`` every now and then, best once an epoch. ``patience``: how many updates in a row a layer may change
    its density by less than ``settled`` before it counts as settled. ``dense``: the rule of layers that are left or made
    dense, by parameter (a weight decay, say); nothing acts on them by default.
    """

    def __init__(
        self,
        pruner: Pruner,
        guide: Guide,
        *,
        patience: int = 2,
        settled: float = 0.01,
        dense: Callable[[str], Rule | None] = lambda name: None,
    ) -> None:
        self.pruner, self.guide, self.patience, self.settled, self.rule = pruner, guide, patience, settled, dense
        self.names = {layer_name(n): n for n in pruner.layers if layer_name(n) in guide.workloads}
        if not self.names:
            listed = ", ".join(map(layer_name, pruner.layers)) or "none"
            raise InvalidOption(f"guided pruning: no layer with a rule ({listed}) has a workload; use the same names")
        self.dense = {n: pruner.parameters[n].copy() for n in self.names.values()}
        self.decisions: dict[str, str] = {}
        self._last: dict[str, float] = {}
        self._still: dict[str, int] = {}
        for layer, name in self.names.items():
            projection = guide.project(layer)
            if not projection.worth:
                pruner.release(name, rule=self.rule(name))
                self.decisions[layer] = projection.reason

    def is_dense(self, layer: str) -> bool:
        """Whether the layer was left dense, or restored."""
        return self.decisions.get(layer, "").startswith(("leave dense", "restored"))

    def update(self, *, restore: bool = True) -> dict[str, str]:
        """Decide on every layer that is still being pruned; returns the new decisions, with their reasons.

        ``restore``: False while layers have not had the time to become sparse; then they only stop.
        """
        new: dict[str, str] = {}
        for layer, name in self.names.items():
            if layer in self.decisions:
                continue
            density = 1 - zeros(self.pruner.parameters[name])
            projection = self.guide.project(layer, density)
            moved = abs(density - self._last.get(layer, math.inf))
            self._still[layer] = self._still.get(layer, 0) + 1 if moved < self.settled else 0
            self._last[layer] = density
            if projection.done:
                self.pruner.freeze(name)
                new[layer] = projection.reason
            elif restore and self._still[layer] >= self.patience and density > projection.break_even:
                self.pruner.release(name, self.dense[name], self.rule(name))
                new[layer] = f"restored: settled at density {density:.3f} above break-even {projection.break_even:.2f}"
        self.decisions |= new
        return new

    def state_dict(self) -> dict[str, Array]:
        """What is not in the pruner's state: decisions, and the dense weights of layers that may need them."""
        state = json.dumps([self.decisions, self._last, self._still])
        waiting = {n: w for layer, n in self.names.items() if layer not in self.decisions for w in [self.dense[n]]}
        return {"guide": np.array(state)} | {f"guide_dense/{n}": w.copy() for n, w in waiting.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """After the pruner's own state."""
        self.decisions, self._last, self._still = json.loads(str(state["guide"]))
        for layer, name in self.names.items():
            if self.is_dense(layer):
                self.pruner.release(name, rule=self.rule(name))
            elif f"guide_dense/{name}" in state:
                self.dense[name] = np.array(state[f"guide_dense/{name}"])


@dataclass(frozen=True)
class Sensitivity:
    """``score``: of the user's function with ``layer`` alone pruned to ``sparsity``; ``base``: with nothing pruned."""

    layer: str
    sparsity: float
    score: float
    base: float


def sensitivity(
    parameters: Mapping[str, Array],
    evaluate: Callable[[], float],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    layers: Iterable[str] | None = None,
    groups: Elements = ELEMENTS,
) -> list[Sensitivity]:
    """Accuracy against sparsity, one layer at a time, by magnitude and without training.

    ``parameters`` are changed in place while ``evaluate()`` runs and restored bit for bit, also after an error.
    ``layers``: which (by default all with two dimensions or more). Raises InvalidOption.
    """
    for s in sparsities:
        check_sparsity(s)
    chosen = [n for n, w in parameters.items() if w.ndim >= 2] if layers is None else list(layers)
    for name in chosen:
        if name not in parameters:
            raise InvalidOption(f"sensitivity: no layer '{name}'; there are: {', '.join(parameters)}")
    base = float(evaluate())
    out = []
    for name in chosen:
        w = parameters[name]
        saved = w.copy()
        try:
            for s in sparsities:
                np.copyto(w, 0, where=~Mask(groups=groups).keep(saved, s))
                out.append(Sensitivity(layer_name(name), float(s), float(evaluate()), base))
                np.copyto(w, saved)
        finally:
            np.copyto(w, saved)
    return out
