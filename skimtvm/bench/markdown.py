"""A benchmark as Markdown: every row, also those that were lost, and the terms of the measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import InvalidOption
from .layer_cases import REFERENCE
from .records import (
    OK,
    OURS,
    EngineTime,
    LayerRow,
    NetworkRow,
    Report,
    Row,
    Spread,
    SweepRow,
    Terms,
    best_peer,
    ours,
    speedup,
    write_text,
)

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
_NAMES = {
    OURS: "SkimTVM",
    "onnxruntime": "ONNX Runtime, dense",
    "openvino": "OpenVINO, dense",
    "deepsparse": "DeepSparse, sparse",
}


def page(report: Report) -> str:
    """All tables of ``report``."""
    parts = ["# Benchmark\n"]
    if report.networks:
        parts += ["## Networks\n", networks(report), ""]
    if report.layers:
        parts += ["## Layers\n", layers(report), ""]
    for sweep in dict.fromkeys(r.sweep for r in report.sweeps):
        parts += [f"## Sweep over {sweep}\n", sweep_table([r for r in report.sweeps if r.sweep == sweep]), ""]
    if report.memory:
        parts += ["## Memory\n", memory(report), ""]
    rows: list[Row] = [*report.networks, *report.layers, *report.sweeps, *report.memory]
    parts += ["## Terms\n", terms(rows)]
    return "\n".join(parts) + "\n"


def unique_terms(rows: Iterable[Row]) -> list[Terms]:
    """Each once: rows of one command share theirs, but for the engines that took part."""
    result: dict[tuple[str, str], Terms] = {}
    for row in rows:
        known = result.get((row.terms.date, row.terms.command), row.terms)
        merged = dataclasses.replace(known, versions={**row.terms.versions, **known.versions})
        result[row.terms.date, row.terms.command] = merged
    return list(result.values())


def terms(rows: Iterable[Row]) -> str:
    """Machines and versions, each with the commands that ran on it and when."""
    runs: dict[str, list[Terms]] = {}
    for t in unique_terms(rows):
        packages = ", ".join(f"{name} {version}" for name, version in sorted(t.versions.items()))
        runs.setdefault(f"{t.cpu}, {t.cpus} CPUs, {t.system}. {packages}.", []).append(t)
    each = (f"{about}\n\n" + "\n".join(f"    {t.command}  # {t.date}" for t in ts) for about, ts in runs.items())
    return "\n\n".join(each)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns whose name ends in ``>`` are aligned right (the mark is not printed)."""
    lines = ["| " + " | ".join(c.rstrip(">") for c in columns) + " |"]
    lines.append("|" + "|".join("---:" if c.endswith(">") else "---" for c in columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def milliseconds(s: Spread | None, *, spread: bool = True) -> str:
    """``12.3 (12.1-12.9)``: median, 10th and 90th percentile."""
    if s is None:
        return ""
    digits = 3 if s.median_ms < 1 else 2 if s.median_ms < 10 else 1
    text = f"{s.median_ms:.{digits}f}"
    return f"{text} ({s.p10_ms:.{digits}f}-{s.p90_ms:.{digits}f})" if spread else text


def _entry(e: EngineTime | None) -> str:
    if e is None:
        return ""
    return milliseconds(e.time) if e.status == OK else e.status


def _optional(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def networks(report: Report) -> str:
    """Milliseconds of a run of the whole batch. A cell of an engine that did not run holds the reason."""
    engines = list(dict.fromkeys(e.engine for row in report.networks for e in row.engines))
    columns = (
        "network",
        "sparsity",
        "batch>",
        "threads>",
        *(f"{_NAMES.get(e, e)}, ms>" for e in engines),
        "against the fastest peer>",
        "GFLOP/s of nonzeros>",
        "dense-equivalent>",
        "largest difference>",
    )
    return table(columns, (_network(row, engines) for row in report.networks))


def head(label: str) -> str:
    """How a reader knows the engine of ``label``."""
    engine, space, model = label.partition(" ")
    return _NAMES.get(engine, engine) + space + model


def _network(row: NetworkRow, engines: Sequence[str]) -> list[str]:
    def cell(engine: str) -> str:
        """An engine that had other models than ours, such as the dense one, says which."""
        found = [e for e in row.engines if e.engine == engine]
        return "; ".join(_entry(e) + (f" ({e.model})" if e.model else "") for e in found)

    mine = ours(row)
    factor = speedup(row)
    errors = [e.difference for e in row.engines if e.difference is not None]
    return [
        row.network,
        row.sparsity,
        str(row.batch),
        str(row.threads),
        *map(cell, engines),
        "" if factor is None else f"{factor:.2f}x" if factor >= 1 else f"{factor:.2f}x (slower)",
        _optional(mine.gflops, 1),
        _optional(mine.dense_gflops, 1),
        f"{max(errors):.1e}" if errors else "",
    ]


def layers(report: Report) -> str:
    """Kernel times, rates and what they are compared with."""
    peers = dict.fromkeys(e.engine for row in report.layers for e in row.engines if e.engine != OURS)
    columns = (
        "layer",
        "shape",
        "density>",
        "threads>",
        "kernel",
        "kernel, ms>",
        "padding before, ms>",
        "run, ms>",
        "GFLOP/s of nonzeros>",
        "dense-equivalent>",
        "share of peak>",
        "alpha>",
        "rate / base layer>",
        *(f"{_NAMES.get(p, p)}, ms>" for p in peers),
        "against the fastest peer>",
        "against SkimCaffe>",
        "weights, GB/s (share of bandwidth; of the same size)>",
    )
    rates = {(r.layer, r.sparsity, r.batch, r.threads): r.gflops for r in report.layers}
    text = table(columns, (_layer(row, list(peers), rates) for row in report.layers))
    first = report.layers[0]
    return f"{text}\n\n" + (
        f"Practical peak of {first.threads} thread(s): {first.peak_gflops:.1f} GFLOP/s (multiply-adds on registers); "
        f"reading 256 MiB: {first.bandwidth_gbs:.1f} GB/s. A peer's time is the lesser of its run and its layer alone by "
        "its own profiler. alpha: efficiency of the dense kernel over that of the sparse one. SkimCaffe: share of the "
        f"peak, padding counted on our side only; its figures are those of {REFERENCE}."
    )


def _layer(row: LayerRow, peers: Sequence[str], rates: dict[tuple[str, str, int, int], float]) -> list[str]:
    by_engine = {e.engine: e for e in row.engines}
    best = best_peer(row.engines, kernel=True)
    base = rates.get((row.base, row.sparsity, row.batch, row.threads))
    weights = ""
    if row.bandwidth_same_gbs is not None:
        share, same = row.weights_gbs / row.bandwidth_gbs, row.weights_gbs / row.bandwidth_same_gbs
        weights = f"{row.weights_gbs:.1f} ({share:.0%}; {same:.0%})"
    return [
        row.layer,
        row.workload,
        f"{row.density:.4g}" + ("" if row.sparsity[:1].isdigit() else f" {row.sparsity}"),
        str(row.threads),
        row.kernel_name,
        milliseconds(row.kernel),
        milliseconds(row.prepare, spread=False),
        milliseconds(ours(row).time, spread=False),
        f"{row.gflops:.1f}",
        f"{row.dense_gflops:.1f}",
        f"{row.share_of_peak:.0%}",
        _optional(row.alpha),
        "" if base is None else f"{row.gflops / base:.2f}",
        *(_peer_layer(by_engine.get(p)) for p in peers),
        "" if best is None else f"{best[1] / row.kernel.median_ms:.1f}x",
        _optional(row.skimcaffe_speedup, 2, "x"),
        weights,
    ]


def _peer_layer(e: EngineTime | None) -> str:
    if e is None or e.status != OK or e.time is None:
        return _entry(e)
    least = min((s for s in (e.time, e.kernel) if s), key=lambda s: s.median_ms)
    return milliseconds(least, spread=False)


def sweep_table(rows: Sequence[SweepRow]) -> str:
    names = [e.engine for e in rows[0].engines]
    columns = ("network", "sparsity", "batch>", "size>", "threads>", *(f"{n}, ms>" for n in names), "auto / best>")
    return table(columns, (_sweep(row) for row in rows))


def _sweep(row: SweepRow) -> list[str]:
    times = [e.time.median_ms for e in row.engines if e.time]
    terms_ = [row.network, row.sparsity, str(row.batch), str(row.size), str(row.threads)]
    return [*terms_, *(_entry(e) for e in row.engines), f"{times[0] / min(times):.2f}"]


def memory(report: Report) -> str:
    columns = ("network", "sparsity", "batch>", "engine", "peak MiB>", "of it after import>", "file, MB>")
    text = table(
        columns,
        (
            [
                r.network,
                r.sparsity,
                str(r.batch),
                f"{r.engine} {r.version}".strip(),
                r.status if r.peak_mib is None else f"{r.peak_mib:.1f}",
                _optional(r.imported_mib, 1),
                f"{r.file_bytes / 1e6:.1f}",
            ]
            for r in report.memory
        ),
    )
    note = "Peak resident set of a process that loads the file and runs it once. PyTorch, which tvm-ffi would import where "
    return f"{text}\n\n{note}it is installed, is hidden from both."


def update_readme(report: Report, readme: Path) -> None:
    """Replace what is between the markers of ``readme`` by the networks' table and its terms. Raises InvalidOption."""
    if not report.networks:
        raise InvalidOption("the benchmark has no networks; run skimtvm bench with --networks first")
    block = f"{networks(report)}\n\n{terms(report.networks)}"
    replace_between(readme, START, END, block)


def replace_between(readme: Path, opening: str, closing: str, block: str) -> None:
    """Put ``block`` between two markers of ``readme``. Raises InvalidOption if they are not there."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidOption(f"'{readme}' cannot be read: {e.strerror}; give a file with {opening}") from None
    head, start, rest = text.partition(opening)
    _, end, tail = rest.partition(closing)
    if not start or not end:
        raise InvalidOption(f"'{readme}' has no {opening} ... {closing}; add the two markers where the table belongs")
    write_text(readme, f"{head}{opening}\n{block}\n{closing}{tail}")
