"""Prune a network while it trains on Fashion-MNIST, three ways and over several seeds, and compile the results.

    python examples/fashion_mnist.py --data DIR --report fashion_mnist.json
    python examples/fashion_mnist.py --report fashion_mnist.json --render README.md    # the results as tables

For every seed: a dense network; from its weights L1 with the gradient-adjusted threshold, group lasso over R x 1 blocks,
and native Winograd layers, each with fine-tuning under the mask. Each result is exported to ONNX and compiled, its
predictions for all 10,000 test images are compared with those of the framework that trained it, and its layers are timed
against the same network compiled with dense kernels only. Killed and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from skimtvm.bench.machine import cpu_model, versions
from skimtvm.bench.markdown import replace_between, table
from skimtvm.errors import InvalidOption, SkimError
from skimtvm.prune.demo import predict, train
from skimtvm.prune.files import write_bytes
from skimtvm.prune.rundir import Config

# method: (sparsity that the pruning phase aims at, points of top-1 that it may cost)
WANTED = {"l1": (0.925, 0.3), "group": (0.82, 0.3), "winograd": (0.82, 0.5)}
# Of pruning and of fine-tuning. Winograd layers take longer, and refitting what stays after each cut leaves less to train.
EPOCHS = {"l1": (4, 5), "group": (4, 5), "winograd": (3, 2)}
BATCH = 100
START, END = "<!-- pruning:start -->", "<!-- pruning:end -->"
NAMES = {"l1": "L1, adjusted threshold", "group": "group lasso, 4x1 blocks", "winograd": "native Winograd"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion", help="folder of IDX files (default: where Debian puts them)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--report", type=Path, default=Path("fashion_mnist.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(WANTED), choices=list(WANTED))
    parser.add_argument("--network", default="cnn")
    parser.add_argument("--epochs", help="dense+prune+tune (default: 8+4+5, for winograd 8+3+2)")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--limit", type=int, help="training images, for a quick look")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only write the tables of --report into FILE")
    options = parser.parse_args()
    if options.render is not None:
        render(options.report, options.render)
        return 0
    base = Config(data=options.data, network=options.network, method="dense", limit=options.limit,
                  threads=options.threads, batch=options.batch, augment=options.network == "cnn")  # fmt: skip
    epochs = {method: (base.epochs[0], *rest) for method, rest in EPOCHS.items()}
    if options.epochs is not None:
        dense_epochs, prune_epochs, tune_epochs = (int(e) for e in options.epochs.split("+"))
        base = replace(base, epochs=(dense_epochs, prune_epochs, tune_epochs))
        epochs = dict.fromkeys(EPOCHS, base.epochs)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        dense = run(replace(base, seed=seed), options.runs)
        for method in options.methods:
            sparsity = WANTED[method][0]
            config = replace(base, seed=seed, method=method, decay=None, sparsity=sparsity, start=dense["run"],
                             epochs=epochs[method])  # fmt: skip
            row = run(config, options.runs)
            # The dense network stands for both: training it and pruning it is what takes the time.
            row |= {"dense_seconds": dense["seconds"], "total_seconds": dense["seconds"] + row["seconds"]}
            if not options.no_compile:
                row |= compiled(Path(row["run"]), options.threads)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("layers", "timing")}), flush=True)
            report = {"command": sys.argv, "cpu": cpu_model(), "versions": versions(), "runs": rows,
                      "summary": summary(rows)}  # fmt: skip
            write_bytes(options.report, (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report["summary"], indent=2))
    return 0 if all(s["reached"] for s in report["summary"].values()) else 1


def run(config: Config, runs: Path) -> dict[str, Any]:
    """Train (or go on with, or just read) one run."""
    last = ""

    def progress(phase: str, _: float) -> None:
        nonlocal last
        if phase != last:
            print(
                f"{time.strftime('%H:%M:%S')} seed {config.seed} {config.method}: {phase}", file=sys.stderr, flush=True
            )
            last = phase

    result = train(config, runs / config.name, progress=progress)
    return {
        "run": str(result.run),
        "method": config.method,
        "seed": config.seed,
        "dense_accuracy": result.dense_accuracy,
        "accuracy": result.accuracy,
        "sparsity": result.sparsity,
        "pruned_sparsity": result.pruned_sparsity,
        "layers": result.layers,
        "seconds": result.seconds,
    }


def compiled(run_dir: Path, threads: int) -> dict[str, Any]:
    """Predictions and layer times of the compiled network."""
    import skimtvm

    logits, data = predict(run_dir)
    path = run_dir / "model.onnx"
    try:
        images = data.test_images
        batch = math.gcd(len(images), BATCH)
        module = skimtvm.compile(str(path), batch=batch)
        name = module.inputs[0].name
        parts = [module.run({name: images[i : i + batch]})["logits"] for i in range(0, len(images), batch)]
        got = np.concatenate(parts)
        ours, theirs = got.argmax(axis=1), logits.argmax(axis=1)
        out: dict[str, Any] = {
            "images": len(images),
            "same_predictions": int((ours == theirs).sum()),
            "largest_difference": float(np.abs(got - logits).max()),
            "compiled_accuracy": float((ours == data.test_labels).mean()),
        }
        sparse, dense = skimtvm.compile(str(path), batch=1), skimtvm.compile(str(path), batch=1, sparse_threshold=0.0)
        mine, theirs_timed = (skimtvm.profile(m, threads=1) for m in (sparse, dense))
        slow = {t.layer.name: t.time.median for t in theirs_timed.layers}
        out["timing"] = [
            {
                "layer": t.layer.name,
                "kernel": t.layer.kernel,
                "density": t.layer.density,
                "ms": 1e3 * t.time.median,
                "dense_ms": 1e3 * slow[t.layer.name],
                "speedup": slow[t.layer.name] / t.time.median,
            }
            for t in mine.layers
            if t.layer.weights and t.layer.name in slow
        ]
        out["network_speedup"] = theirs_timed.total.median / mine.total.median
        return out
    except SkimError as e:
        return {"compile_error": f"{type(e).__name__}: {e}"}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds, by method. Differences are in points of top-1, positive where pruning won."""
    out: dict[str, Any] = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        wanted, allowed = WANTED[method]
        difference = [100 * (r["accuracy"] - r["dense_accuracy"]) for r in mine]
        key = "pruned_sparsity" if method == "winograd" else "sparsity"
        out[method] = {
            "seeds": len(mine),
            "dense_top1": spread([100 * r["dense_accuracy"] for r in mine]),
            "top1": spread([100 * r["accuracy"] for r in mine]),
            "difference": spread(difference),
            "sparsity": spread([r[key] for r in mine]),
            "minutes": spread([r["total_seconds"] / 60 for r in mine]),
            "reached": statistics.mean(difference) >= -allowed and min(r[key] for r in mine) >= wanted - 0.005,
        }
        if all("same_predictions" in r for r in mine):
            out[method]["same_predictions"] = [r["same_predictions"] for r in mine]
            out[method]["network_speedup"] = spread([r["network_speedup"] for r in mine])
    return out


def render(source: Path, readme: Path) -> None:
    """Put the results in the JSON ``source`` as Markdown between the markers of ``readme``. Raises InvalidOption."""
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
        block = "\n\n".join([methods_table(report["summary"]), *layer_tables(report["runs"]), origin(report)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidOption(f"'{source}' is no report of this experiment ({type(e).__name__}: {e})") from None
    replace_between(readme, START, END, block)


def methods_table(results: dict[str, Any]) -> str:
    """A row a method, also where it missed its aim: means over the seeds, standard deviations in parentheses."""

    def cell(value: dict[str, float], digits: int, factor: float = 1.0, *, sign: bool = False) -> str:
        text = f"{factor * value['mean']:{'+' if sign else ''}.{digits}f}"
        return f"{text} ({factor * value['stdev']:.{digits}f})"

    rows = []
    for method, r in results.items():
        wanted, allowed = WANTED[method]
        same, gain = r.get("same_predictions"), r.get("network_speedup")
        least, most = r["difference"]["min"], r["difference"]["max"]
        rows.append([
            NAMES[method], str(r["seeds"]), cell(r["dense_top1"], 2), cell(r["top1"], 2),
            f"{cell(r['difference'], 2, sign=True)}, {least:+.2f} to {most:+.2f}", cell(r["sparsity"], 1, 100),
            f"{'yes' if r['reached'] else 'no'} ({100 * wanted:.0f} %, {allowed} points)",
            "not compiled" if same is None else ", ".join(map(str, same)), cell(r["minutes"], 1),
            "" if gain is None else f"{cell(gain, 2)}x",
        ])  # fmt: skip
    columns = ("method", "seeds>", "dense top-1, %>", "top-1, %>", "difference, points>", "zeros, %>", "aim reached",
               "same predictions of 10,000>", "minutes>", "network against dense kernels>")  # fmt: skip
    return table(columns, rows)


def layer_tables(runs: list[dict[str, Any]]) -> list[str]:
    """A table a method: each layer with sparse against with dense kernels, means over the seeds."""
    out = []
    for method in dict.fromkeys(r["method"] for r in runs):
        rows = [t for r in runs if r["method"] == method for t in r.get("timing", ())]
        lines = []
        for layer in dict.fromkeys(t["layer"] for t in rows):
            mine = [t for t in rows if t["layer"] == layer]
            ms, dense, density = (statistics.mean(t[key] for t in mine) for key in ("ms", "dense_ms", "density"))
            kernels = ", ".join(dict.fromkeys(f"`{t['kernel']}`" for t in mine))
            lines.append([layer, kernels, f"{density:.3f}", f"{ms:.4f}", f"{dense:.4f}", f"{dense / ms:.2f}x"])
        if lines:
            columns = ("layer", "kernel", "density>", "ms>", "dense kernel, ms>", "speed-up>")
            out.append(f"{NAMES[method]}, one image, one thread:\n\n{table(columns, lines)}")
    return out


def origin(report: dict[str, Any]) -> str:
    """Machine and command; of absolute paths the last name."""
    command = shlex.join(Path(a).name if os.path.isabs(a) else a for a in report["command"])
    about = ", ".join([report["cpu"], *(f"{k} {v}" for k, v in report["versions"].items())]) if "cpu" in report else ""
    return f"Means over the seeds, standard deviation in parentheses; minutes include the dense training. {about}".rstrip(
        " ") + f"\n\n    python {command}"  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SkimError as e:
        sys.exit(f"fashion_mnist: error: {e}")
