"""``skimtvm tune``: search for better knobs of a network's kernels on this machine or others."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._common import Pair, ShapePair, Threads, plural, print_table

if TYPE_CHECKING:
    from ..tune.session import Progress, Result
    from ..tune.tasks import Task


class Duration(click.ParamType):
    """``90``, ``90s``, ``20m`` or ``2h``: seconds."""

    name = "20m"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"'{value}' is no time; give seconds, or as in 90s, 20m, 2h", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class Address(click.ParamType):
    """``host:port``."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            self.fail(f"'{value}' is not HOST:PORT, as in 127.0.0.1:9190", param, ctx)
        return host, int(port)


def measuring_options(command: Any) -> Any:
    """How kernels are timed: shared by tune and calibrate."""
    for option in (
        click.option(
            "--cpu", "cpus", multiple=True, type=click.IntRange(min=0), help="CPU to time on; repeat for more."
        ),
        click.option("--lock", type=click.Path(dir_okay=False), help="File to lock (flock) while kernels are timed."),
        click.option(
            "--realtime", type=click.IntRange(0, 99), default=0, help="SCHED_FIFO priority while kernels are timed."
        ),
    ):
        command = option(command)
    return command


@click.command("tune", short_help="Search for better kernel knobs on this machine.")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--target", default="auto", show_default=True, help="LLVM CPU name, or auto for this machine.")
@click.option(
    "--trials", type=click.IntRange(1, 100000), default=64, show_default=True, help="Trials of each workload."
)
@click.option("--time-budget", type=Duration(), help="Stop after this time, e.g. 20m.  [default: none]")
@click.option(
    "--log", "folder", type=click.Path(path_type=Path, file_okay=False), default=Path("tuning_logs"), show_default=True,
    help="Folder of the tuning log; trials that it holds are not repeated.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), help="Value of a free first dimension of the inputs.")
@click.option(
    "--input-shape", "input_shapes", multiple=True, type=ShapePair("NAME=1,3,224,224"),
    help="Shape of an input with free dimensions; repeat for each.",
)  # fmt: skip
@click.option("--force", multiple=True, type=Pair("LAYER=KERNEL"), help="Kernel of one layer; repeat for more.")
@click.option("--threads", type=Threads(), default=1, show_default=True, help="Threads that the kernels run on.")
@click.option("--dense", is_flag=True, help="Tune dense layers, too.")
@click.option(
    "--search", type=click.Choice(["xgboost", "random"]), default="xgboost", show_default=True, help="What guides it."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random choices.")
@click.option("--timeout", type=Duration(), default="60s", show_default=True, help="For building one candidate.")
@click.option("--rpc-tracker", type=Address(), help="TVM RPC tracker of the machines to time on.")
@click.option("--rpc-key", default="", help="Key under which their servers are registered.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the results as JSON.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the best so far over trials (PNG).")
@click.option("--overwrite", is_flag=True, help="Replace --report and --plot if they exist.")
@measuring_options
def tune_command(
    models: tuple[Path, ...], report: Path | None, plot: Path | None, overwrite: bool, **options: Any
) -> None:
    """Tune the kernels of MODELS (.onnx) with their own sparse weights, and keep every trial in the log.

    Interrupt it at any time: what was measured stays, and the same command goes on from there. skimtvm compile --log
    uses the result.
    """
    from ..errors import InvalidOption, OutputExists
    from ..tvm_runtime import import_compiler

    for file in (report, plot):
        if file is not None and file.exists() and not overwrite:
            raise OutputExists(f"'{file}' exists; choose another name or pass --overwrite")
    import_compiler()
    from ..target import resolve
    from ..tune.search import xgboost

    if options["search"] == "xgboost":
        xgboost()
    if bool(options["rpc_tracker"]) != bool(options["rpc_key"]):
        raise InvalidOption("--rpc-tracker and --rpc-key belong together; give both")
    if not options["rpc_tracker"] and resolve(options["target"]) != resolve("auto"):
        here = resolve("auto").mcpu
        raise InvalidOption(
            f"--target {options['target']} is not this machine ({here}); time on one of its kind with --rpc-tracker"
        )
    tasks = _tasks(models, options)
    results: list[Result] = []
    interrupted = False
    try:
        for result in _tune(tasks, options):
            results.append(result)
            _say(f"{result.task}: {result.gain:.2f}x, {result.median_s * 1e3:.4f} ms, {plural(result.trials, 'trial')}")
    except KeyboardInterrupt:
        interrupted = True
    _show(results, len(tasks), options["folder"], report, plot)
    if interrupted:
        raise click.Abort


def _tasks(models: tuple[Path, ...], options: dict[str, Any]) -> list[Task]:
    from .._compile import make_options
    from ..tune.tasks import extract, merge

    chosen = make_options(
        {k: options[k] for k in ("target", "batch", "input_shapes", "force") if options[k] is not None}
        | {"log": "none"}
    )
    found: list[Task] = []
    for model in models:
        mine = extract(model, chosen, threads=options["threads"], dense=options["dense"])
        _say(f"{model}: {plural(len(mine), 'workload')} to tune")
        found += mine
    return merge(found)


def _tune(tasks: list[Task], options: dict[str, Any]) -> Iterator[Result]:
    from ..tune.measure import Measurer, Protocol, servers
    from ..tune.session import Session
    from ..tune.worker import Options

    how = Options(
        lock=options["lock"] or "",
        realtime=options["realtime"],
        tracker=options["rpc_tracker"],
        rpc_key=options["rpc_key"],
    )
    workers = servers(options["rpc_tracker"], options["rpc_key"]) if options["rpc_tracker"] else 1
    protocol = Protocol(timeout=options["timeout"])
    budget = options["time_budget"]
    deadline = time.monotonic() + budget if budget else float("inf")
    measurer = Measurer(how, protocol, threads=options["threads"], workers=workers, cpus=options["cpus"])
    with measurer, _progress(deadline) as show:
        session = Session(
            options["folder"], measurer, options["search"], options["trials"], options["seed"], deadline, show
        )
        yield from session.run(tasks)


def _say(text: str) -> None:
    click.echo(text, err=True)


@contextmanager
def _progress(deadline: float) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr if that is a screen."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("", total=1.0)

        def show(p: Any) -> None:
            fraction = (p.done + min(1.0, p.trials / max(1, p.wanted))) / max(1, p.total)
            left = (
                f", {max(0, deadline - time.monotonic()):.0f} s of the budget left" if deadline != float("inf") else ""
            )
            text = f"{p.done + 1}/{p.total} {escape(p.task)}: trial {p.trials}, best {p.best:.2f}x{left}"
            bar.update(row, description=text, completed=fraction)

        yield show


def _show(results: list[Result], wanted: int, folder: Path, report: Path | None, plot: Path | None) -> None:
    from ..bench.records import write_text
    from ..tune import report as r

    if results:
        print_table(r.COLUMNS, r.rows(results))
    gain = r.geometric_mean([x.gain for x in results])
    click.echo(
        f"{len(results)} of {plural(wanted, 'workload')} tuned: {gain:.3f}x the default knobs (geometric mean); "
        f"log: {folder}"
    )
    if report is not None:
        write_text(report, r.to_json(results) + "\n")
    if plot is not None:
        r.draw(results, plot)
