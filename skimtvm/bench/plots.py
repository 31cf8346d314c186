"""The benchmark as PNG images, with matplotlib (``pip install skimtvm[plot]``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EnvironmentProblem
from .markdown import head
from .records import OK, NetworkRow, Report, SweepRow

_AXES = {"sparsity": "share of zeros", "batch": "batch size", "size": "height and width of the image"}


def matplotlib() -> Any:
    """``matplotlib.pyplot`` that draws to files. Raises EnvironmentProblem."""
    try:
        import matplotlib as package

        package.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise EnvironmentProblem("plots need matplotlib: pip install 'skimtvm[plot]', or pass --no-plots") from None
    return pyplot


def draw(report: Report, folder: Path) -> list[Path]:
    """The plots of ``report`` as PNG files in ``folder``."""
    plt = matplotlib()
    files = []
    if report.networks:
        files.append(_networks(plt, report.networks, folder / "networks.png"))
    groups: dict[tuple[str, ...], list[SweepRow]] = {}
    for row in report.sweeps:
        groups.setdefault((row.sweep, row.network, str(row.threads)), []).append(row)
    for (sweep, network, threads), rows in groups.items():
        files.append(_sweep(plt, rows, folder / f"sweep-{sweep}-{network}-t{threads}.png"))
    return files


def _networks(plt: Any, rows: Sequence[NetworkRow], path: Path) -> Path:
    """Milliseconds an input (of a batch), a group of bars for each row; whiskers from the 10th to the 90th percentile."""
    labels = list(dict.fromkeys(e.label for row in rows for e in row.engines))
    height = 0.8 / len(labels)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows) * (len(labels) + 1)), layout="constrained")
    for k, label in enumerate(labels):
        bars = [
            (y + k * height, e.time, row.batch)
            for y, row in enumerate(rows)
            for e in row.engines
            if e.label == label and e.status == OK and e.time
        ]
        widths = [t.median_ms / n for _, t, n in bars]
        low = [(t.median_ms - t.p10_ms) / n for _, t, n in bars]
        high = [(t.p90_ms - t.median_ms) / n for _, t, n in bars]
        axes.barh(
            [y for y, _, _ in bars], widths, height, xerr=(low, high), label=head(label), error_kw={"linewidth": 0.8}
        )
    names = [f"{r.network} {r.sparsity}, batch {r.batch}, {r.threads} thr." for r in rows]
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], names)
    axes.invert_yaxis()
    axes.set_xlabel("ms an input (median, 10th to 90th percentile)")
    axes.set_title(rows[0].terms.cpu)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _sweep(plt: Any, rows: Sequence[SweepRow], path: Path) -> Path:
    """Milliseconds over the swept value, a line for each choice with its 10th to 90th percentile."""
    first, ordered = rows[0], sorted(rows, key=lambda r: r.value)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for engine in [e.engine for e in first.engines]:
        points = [(r.value, e.time) for r in ordered for e in r.engines if e.engine == engine and e.time]
        x = [value for value, _ in points]
        axes.plot(x, [t.median_ms for _, t in points], marker="o", markersize=4, label=engine)
        axes.fill_between(x, [t.p10_ms for _, t in points], [t.p90_ms for _, t in points], alpha=0.2)
    if first.sweep == "batch":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    fixed = {"sparsity": f"sparsity {first.sparsity}", "batch": f"batch {first.batch}", "size": f"size {first.size}"}
    held = ", ".join(text for name, text in fixed.items() if name != first.sweep)
    axes.set_xlabel(_AXES[first.sweep])
    axes.set_ylabel("ms a run")
    axes.set_title(f"{first.network}, {held}, {first.threads} thread(s), {first.terms.cpu}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
