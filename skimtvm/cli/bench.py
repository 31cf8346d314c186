"""``skimtvm bench``: networks, layers and sweeps against other engines on this machine."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._common import Threads

if TYPE_CHECKING:
    from ..bench.engines import Peers
    from ..bench.records import Report, Row
    from ..bench.timing import Rounds

NETWORKS = ("resnet50", "googlenet", "alexnet")
FOLDER = "skimtvm-bench"
_LAYER_PEERS = ("onnxruntime", "openvino")


class List(click.ParamType):
    """Comma-separated values of one type."""

    def __init__(self, item: click.ParamType, name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        texts = dict.fromkeys(t.strip() for t in str(value).split(",") if t.strip())
        return tuple(self.item.convert(t, param, ctx) for t in texts)


@click.command("bench", short_help="Measure against other engines on this machine.")
@click.option(
    "--networks",
    type=List(click.STRING, "A,B"),
    help=f"Networks of the zoo, e.g. resnet50, bert.  [default: {','.join(NETWORKS)}]",
)
@click.option(
    "--layers", is_flag=True, help="Measure single layers instead of networks; --batch holds for convolutions."
)
@click.option("--only", type=List(click.STRING, "LAYER,..."), help="With --layers: these of the table.")
@click.option(
    "--sweep",
    "sweeps",
    type=List(click.Choice(["sparsity", "batch", "size"]), "sparsity,batch,size"),
    help="Measure how the time grows instead: kernels chosen, all dense, all sparse.",
)
@click.option("--values", type=List(click.FLOAT, "V,..."), help="With --sweep: the values of the swept quantity.")
@click.option("--memory", is_flag=True, help="Measure peak memory of one run instead.")
@click.option(
    "--sparsity",
    type=List(click.STRING, "S,..."),
    help="seed (published, by layer), none, a share of zeros, or block4:0.9 (4x1 blocks, first layer dense).  "
    "[default: 0.9, for networks also seed where it is known]",
)
@click.option(
    "--batch", type=List(click.IntRange(1, 4096), "N,..."), default="1", show_default=True, help="Batch sizes."
)
@click.option(
    "--threads", type=List(Threads(), "N,..."), default="1", show_default=True, help="Threads of every engine."
)
@click.option("--repeat", type=click.IntRange(1, 100000), default=20, show_default=True, help="Samples of each engine.")
@click.option(
    "--warmup", type=click.IntRange(0, 1000), default=3, show_default=True, help="Calls before the first sample."
)
@click.option(
    "--peers",
    type=List(click.Choice(["onnxruntime", "openvino", "deepsparse", "none"]), "A,B"),
    default="onnxruntime,openvino,deepsparse",
    show_default=True,
    help="Engines to measure beside SkimTVM; one that is not installed says so in the table.",
)
@click.option(
    "--deepsparse-python",
    type=click.Path(path_type=Path),
    help="Python of a virtual environment with deepsparse==1.8.0 (Python 3.11, numpy<2).",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder for bench.json, bench.md, plots.  [default: {FOLDER}]",
)
@click.option("--append", is_flag=True, help="Add to the bench.json there, replacing rows of the same terms.")
@click.option("--overwrite", is_flag=True, help="Replace the bench.json there.")
@click.option("--plots/--no-plots", default=True, help="Draw PNG files (needs matplotlib).")
@click.option(
    "--render", type=click.Path(path_type=Path), help="Measure nothing: make tables and plots of this bench.json."
)
@click.option(
    "--readme", type=click.Path(path_type=Path), help="Put the networks' table between the markers of this file."
)
def bench_command(output: Path | None, render: Path | None, readme: Path | None, plots: bool, **options: Any) -> None:
    """Measure SkimTVM against ONNX Runtime, OpenVINO and DeepSparse: interleaved, with the same number of threads.

    Without --layers, --sweep or --memory, whole networks are measured. Rows appear as they are done and are kept in
    OUTPUT/bench.json at once. Install the peers with: pip install onnxruntime openvino; DeepSparse needs an environment
    of its own.
    """
    from ..bench import records

    if render is not None:
        report = records.read(render)
        if output is None and readme is None:
            from ..bench.markdown import page

            click.echo(page(report), nl=False)
    else:
        output = output or Path(FOLDER)
        report = _measure(output, **options)
    if output is not None:
        _show(report, output, plots)
    if readme is not None:
        from ..bench.markdown import update_readme

        update_readme(report, readme)
        click.echo(f"table of {readme} updated")


def _measure(output: Path, *, append: bool, overwrite: bool, **options: Any) -> Report:
    """Measure what ``options`` ask for; the report grows in ``output`` row by row."""
    from ..bench import records
    from ..errors import OutputExists

    file = output / "bench.json"
    report = records.Report()
    if file.exists():
        if append:
            report = records.read(file)
        elif not overwrite:
            raise OutputExists(f"'{file}' exists; pass --append to add to it or --overwrite to replace it")
    for row in _rows(**options):
        report = report.with_row(row)
        records.write_text(file, report.to_json())
        click.echo(_line(row))
    return report


def _rows(
    *,
    networks: tuple[str, ...] | None,
    layers: bool,
    sweeps: tuple[str, ...] | None,
    memory: bool,
    sparsity: tuple[str, ...] | None,
    threads: tuple[int, ...],
    peers: tuple[str, ...],
    deepsparse_python: Path | None,
    repeat: int,
    warmup: int,
    **more: Any,
) -> Iterator[Row]:
    from .. import zoo
    from ..bench import machine
    from ..bench.engines import Peers
    from ..bench.sparsity import Sparsity
    from ..bench.sweeps import points
    from ..bench.timing import Rounds
    from ..tvm_runtime import import_compiler

    whole = not (layers or sweeps or memory)
    kinds = [Sparsity.parse(text) for text in sparsity or ("0.9",)]
    if layers:
        _check_layers(more["only"])
    names = networks or (("resnet50",) if sweeps or memory else NETWORKS)
    for name in names:
        zoo.check_name(name)
        for kind in kinds if whole or memory else ():
            kind.check(name)
        for sweep in sweeps or ():
            for point in points(sweep, name, kinds[0], more["batch"][0], more["values"] or ()):
                point.sparsity.check(name)
    cases = [(n, Sparsity("seed")) for n in names if sparsity is None and zoo.has_table(n)] if whole else []
    cases = sorted([*cases, *itertools.product(names, kinds)], key=lambda case: names.index(case[0]))
    import_compiler()
    who = Peers(tuple(p for p in peers if p != "none"), deepsparse_python)
    terms = machine.terms(sys.argv[1:])
    common: dict[str, Any] = {"terms": terms, "rounds": Rounds(repeat, warmup)}
    for count in threads:
        if whole:
            yield from _network_rows(cases, count, who, common, **more)
        if layers:
            rounds = Rounds(repeat, warmup, min_time=0.02)
            yield from _layer_rows(kinds, count, who, rounds, terms, more["only"], more["batch"])
        for sweep in sweeps or ():
            yield from _sweep_rows(sweep, names, kinds, count, common, **more)
        if memory:
            yield from _memory_rows(cases, count, terms, more["batch"])


def _network_rows(
    cases: list[tuple[str, Any]],
    threads: int,
    peers: Peers,
    common: dict[str, Any],
    *,
    batch: tuple[int, ...],
    **_: Any,
) -> Iterator[Row]:
    from ..bench.networks import measure_network

    for (name, kind), n in itertools.product(cases, batch):
        say = _progress(f"{name} {kind} batch {n}")
        yield measure_network(name, kind, n, threads, peers=peers, say=say, **common)


def _check_layers(only: tuple[str, ...] | None) -> None:
    from ..bench.layer_cases import CASES
    from ..errors import InvalidOption

    names = [case.name for case in CASES]
    for name in only or ():
        if name not in names:
            raise InvalidOption(f"--only {name}: no such layer; choose from {', '.join(names)}")


def _layer_rows(
    kinds: Any,
    threads: int,
    peers: Peers,
    rounds: Rounds,
    terms: Any,
    only: tuple[str, ...] | None,
    batch: tuple[int, ...],
) -> Iterator[Row]:
    from ..bench.engines import Peers
    from ..bench.layer_cases import CASES
    from ..bench.layers import measure_layer
    from ..bench.machine import Rates

    dense = Peers(tuple(p for p in peers.names if p in _LAYER_PEERS))
    rates = Rates.measure(threads)
    click.echo(f"practical peak {rates.peak_gflops:.1f} GFLOP/s, reading memory {rates.bandwidth_gbs:.1f} GB/s")
    done = set()
    for kind, n, plain in itertools.product(kinds, batch, CASES):
        case = plain.at(n)
        key = case, case.pruned(kind)
        if (not only or case.name in only) and key not in done:
            done.add(key)
            say = _progress(f"{case.name} {kind} batch {n}")
            yield measure_layer(case, kind, threads, peers=dense, rounds=rounds, rates=rates, terms=terms, say=say)


def _sweep_rows(
    sweep: str,
    names: tuple[str, ...],
    kinds: Any,
    threads: int,
    common: dict[str, Any],
    *,
    batch: tuple[int, ...],
    values: tuple[float, ...] | None,
    **_: Any,
) -> Iterator[Row]:
    from ..bench.sweeps import measure_point, points

    for name in names:
        for point in points(sweep, name, kinds[0], batch[0], values or ()):
            yield measure_point(point, threads, say=_progress(f"{name} {sweep} {point.value:g}"), **common)


def _memory_rows(cases: list[tuple[str, Any]], threads: int, terms: Any, batch: tuple[int, ...]) -> Iterator[Row]:
    from ..bench.memory import measure_memory

    for (name, kind), n in itertools.product(cases, batch):
        yield from measure_memory(name, kind, n, threads, terms=terms, say=_progress(f"{name} {kind} batch {n}"))


def _progress(what: str) -> Any:
    """Says on a screen what is going on; a log gets the rows only."""

    def say(text: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\x1b[2K\r{what}: {text}\r", nl=False, err=True)

    return say


def _line(row: Row) -> str:
    """One line about a row that is done."""
    from ..bench.markdown import milliseconds
    from ..bench.records import OK, LayerRow, MemoryRow, SweepRow

    if isinstance(row, MemoryRow):
        peak = row.status if row.peak_mib is None else f"{row.peak_mib:.1f} MiB"
        return f"{row.network} {row.sparsity} batch {row.batch}: {row.engine} {peak}"
    times = ", ".join(f"{e.label} {milliseconds(e.time) if e.status == OK else e.status}" for e in row.engines)
    if isinstance(row, LayerRow):
        rate = f"kernel {milliseconds(row.kernel)} ms, {row.share_of_peak:.0%} of peak"
        return f"{row.layer} {row.sparsity} batch {row.batch}: {rate}; {times}"
    where = f" size {row.size}" if isinstance(row, SweepRow) else ""
    return f"{row.network} {row.sparsity} batch {row.batch}{where} threads {row.threads}: {times}"


def _show(report: Report, output: Path, plots: bool) -> None:
    """bench.md and the plots beside bench.json."""
    from ..bench.markdown import page
    from ..bench.plots import draw
    from ..bench.records import write_text
    from ..errors import EnvironmentProblem

    write_text(output / "bench.md", page(report))
    click.echo(f"{output / 'bench.md'} written")
    if not plots:
        return
    try:
        for file in draw(report, output):
            click.echo(f"{file} written")
    except EnvironmentProblem as e:
        print(f"skimtvm: warning: {e}", file=sys.stderr)
