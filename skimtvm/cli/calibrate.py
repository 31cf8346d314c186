"""``skimtvm calibrate``: measure how fast each kernel is on this machine."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._common import number, plural, print_table
from .compile import progress
from .tune import measuring_options

if TYPE_CHECKING:
    from ..calibration import Calibration


@click.command("calibrate", short_help="Measure the kernels on this machine, for the choice among them.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: tuning_logs/<cpu>/calibration.json]",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="A few small layers only: seconds in place of minutes, and a rough table.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@measuring_options
def calibrate_command(
    output: Path | None,
    quick: bool,
    overwrite: bool,
    quiet: bool,
    cpus: tuple[int, ...],
    lock: str | None,
    realtime: int,
) -> None:
    """Time every kernel on a grid of shapes and densities, on one thread, and write the table by which skimtvm compile and
    guided pruning choose. Interrupted, it keeps what it measured in OUTPUT.partial; the same command goes on from there."""
    from ..errors import InvalidOption, OutputExists
    from ..tvm_runtime import import_compiler

    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            raise InvalidOption(f"--cpu {' --cpu '.join(map(str, cpus))}: this process may not run there") from None
    import_compiler()
    from ..calibration import FILE
    from ..target import resolve

    path = output if output is not None else Path("tuning_logs") / resolve().mcpu / FILE
    if path.exists() and not overwrite:
        raise OutputExists(f"'{path}' exists; choose another --output or pass --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputExists(f"'{path}' cannot be written: {e.strerror}; choose another --output") from None
    from ..tune.calibrate import FULL, QUICK, calibrate
    from ..tune.worker import Options

    options = Options(lock=lock or "", realtime=realtime)
    kept = path.with_name(f"{path.name}.partial")
    with progress(quiet) as report:
        table = calibrate(QUICK if quick else FULL, options, report or (lambda phase, fraction: None), kept)
        table.save(path)
        kept.unlink()
    if not quiet:
        _show(table)
        click.echo(f"{path}: {plural(len(table.points), 'measurement')}")


def _show(table: Calibration) -> None:
    """The rates, and alpha by kernel: over all shapes, and its range."""
    from ..tune.calibrate import DENSITIES

    rates = ", ".join(f"{rate * 1e-9:.0f} GB/s at {size / 2**20:g} MiB" for size, rate in table.bandwidths)
    click.echo(f"{table.cpu_model} ({table.cpu}), one thread: {table.peak_flops * 1e-9:.0f} GFLOP/s, {rates}")
    groups: dict[tuple[str, str, float], list[float]] = {}
    for p in table.points:
        if p.alpha is not None:
            near = min(DENSITIES, key=lambda x: abs(math.log(x / p.stored)))
            groups.setdefault((p.op, p.kernel, near), []).append(p.alpha)
    columns = ("operator", "kernel", "density>", "shapes>", "alpha, median>", "least>", "largest>", "faster below>")
    rows = [
        (op, kernel, f"{x:g}", len(v), number(statistics.median(v), 2), number(min(v), 2), number(max(v), 2),
         number(1 / statistics.median(v), 2))
        for (op, kernel, x), v in sorted(groups.items())
    ]  # fmt: skip
    print_table(columns, rows)
