"""What a tuning run found: a table, JSON, a plot of the best so far, and how well the model ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .session import Result

COLUMNS = ("kernel", "workload", "density>", "layers>", "default, ms>", "best, ms>", "gain>", "knobs", "trials>",
           "failed>", "Spearman>")  # fmt: skip


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation with mean ranks for ties; None below 4 pairs or where one side is constant."""
    if len(a) < 4 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def short(knobs: Any) -> str:
    """``rows=1 vectors=7 ...`` without what is off."""
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(knobs).items() if v is not False)


def rows(results: Sequence[Result]) -> list[tuple[object, ...]]:
    """The cells of COLUMNS."""
    out: list[tuple[object, ...]] = []
    for r in results:
        rank = spearman(r.predicted, r.measured)
        out.append((
            r.task.site.name, str(r.task.site.workload), f"{r.task.sparsity.density:.3f}", len(r.task.layers),
            f"{r.default_s * 1e3:.4f}", f"{r.median_s * 1e3:.4f}", f"{r.gain:.3f}x", short(r.knobs), r.trials, r.failed,
            "" if rank is None else f"{rank:.2f}",
        ))  # fmt: skip
    return out


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 1.0


def to_json(results: Sequence[Result]) -> str:
    """One object: a list of workloads, the geometric mean of the gains, Spearman over all trials that were predicted."""
    predicted = [p for r in results for p in r.predicted]
    measured = [m for r in results for m in r.measured]
    return json.dumps(
        {
            "geometric_mean_gain": geometric_mean([r.gain for r in results]),
            "spearman": spearman(predicted, measured),
            "predicted_trials": len(predicted),
            "workloads": [
                {
                    "kernel": r.task.site.name,
                    "workload": str(r.task.site.workload),
                    "density": r.task.sparsity.density,
                    "layers": list(r.task.layers),
                    "default_ms": r.default_s * 1e3,
                    "best_ms": r.median_s * 1e3,
                    "gain": r.gain,
                    "knobs": dataclasses.asdict(r.knobs),
                    "trials": r.trials,
                    "resumed": r.resumed,
                    "failed": r.failed,
                    "spearman": spearman(r.predicted, r.measured),
                    "best_so_far": list(r.curve),
                }
                for r in results
            ],
        },
        indent=1,
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Best gain so far over trials, a line for each workload, as PNG. Raises EnvironmentProblem without matplotlib."""
    from ..bench.plots import matplotlib

    plt = matplotlib()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for r in results:
        if r.curve:
            label = f"{r.task.site.name} {r.task.site.workload} {r.task.sparsity.density:.3f}"
            axes.step(range(1, len(r.curve) + 1), r.curve, where="post", linewidth=1, label=label)
    if 0 < len(results) <= 12:
        axes.legend(fontsize=6)
    axes.set_xlabel("trials")
    axes.set_ylabel("best so far, times as fast as the default knobs")
    figure.savefig(path, dpi=150)
    plt.close(figure)
