"""Accuracy and per-layer sparsity of a training run, drawn with matplotlib."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

from ..errors import EnvironmentProblem, InvalidOption
from .files import check_output, write_bytes
from .rundir import read_metrics


def plot(run: str | Path, output: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a PNG of the run directory ``run`` (to RUN/plot.png by default, which is replaced) and return its path.

    Raises InvalidOption if there are no metrics, EnvironmentProblem without matplotlib, OutputExists.
    """
    folder = Path(run)
    records = read_metrics(folder)
    if not records:
        raise InvalidOption(f"'{folder}' holds no metrics.jsonl with a finished epoch; give the folder of train-demo")
    if output is None:
        target, overwrite = folder / "plot.png", True
    else:
        target = check_output(output, ".png", overwrite=overwrite)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentProblem('plot needs matplotlib; install it with: pip install "skimtvm[plot]"') from None
    try:
        steps = [r["step"] for r in records]
        figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(steps, [100 * r["accuracy"] for r in records], color="black", marker=".")
        top.set_ylabel("top-1 accuracy (%)")
        top.set_title(folder.resolve().name, fontsize=9)
        layers = list(dict.fromkeys(name for r in records for name in r["layers"]))
        for i, name in enumerate(layers):
            style = ("-", "--", ":", "-.")[i // 10 % 4]  # ten colours, then another line style
            bottom.plot(steps, [100 * r["layers"].get(name, float("nan")) for r in records], style, label=name)
        bottom.plot(steps, [100 * r["sparsity"] for r in records], color="black", linewidth=2, label="all weights")
        bottom.set_ylabel("zeros (%)")
        bottom.set_xlabel("step")
        bottom.set_ylim(-2, 102)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            for before, after in pairwise(records):
                if before["phase"] != after["phase"]:
                    axis.axvline(before["step"], color="gray", linestyle="--", linewidth=1)
                    if axis is top:
                        axis.text(
                            before["step"], 1.0, f" {after['phase']}", transform=axis.get_xaxis_transform(), va="top"
                        )
        if len(layers) <= 40:
            bottom.legend(fontsize=7, ncols=1 + len(layers) // 12, loc="center left", bbox_to_anchor=(1.0, 0.5))
    except (KeyError, TypeError) as e:
        raise InvalidOption(f"'{folder}': metrics.jsonl has records of another kind (missing {e})") from None
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(target, picture.getvalue(), overwrite=overwrite)
    return target
