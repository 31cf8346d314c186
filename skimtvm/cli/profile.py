"""``skimtvm profile``: time every layer of a module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._common import number, plural, print_table, repeat_option, threads_option

if TYPE_CHECKING:
    from ..profiler import Profile


@click.command("profile", short_help="Time the layers of a compiled module.")
@click.argument("module", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--batch", type=click.IntRange(min=1), help="Which size of a module with several.  [default: largest]")
@repeat_option
@threads_option
def profile_command(module: Path, as_json: bool, batch: int | None, repeat: int, threads: int | None) -> None:
    """Time the layers of MODULE (.so) on random input."""
    from ..profiler import profile

    result = profile(module, repeat=repeat, threads=threads, batch=batch)
    if as_json:
        click.echo(result.to_json())
        return
    print_profile(result)


COLUMNS = ("layer", "op", "kernel", "density>", "ms>", "p10-p90>", "share>", "GFLOP/s>", "dense-eq.>")


def print_profile(result: Profile, *, why: bool = False) -> None:
    """The per-layer table and the totals; ``why`` adds the reason for each kernel."""
    rows = [
        (
            t.layer.name,
            t.layer.op,
            t.layer.kernel,
            number(t.layer.density) if t.layer.weights else "",
            number(t.time.median * 1e3),
            f"{t.time.p10 * 1e3:.3f}-{t.time.p90 * 1e3:.3f}",
            f"{100 * t.time.median / result.total.median:.1f} %",
            number(t.gflops, 1) if t.layer.macs else "",
            number(t.dense_gflops, 1) if t.layer.macs else "",
            *([t.layer.reason] if why else []),
        )
        for t in result.layers
    ]
    print_table((*COLUMNS, *(["why"] if why else [])), rows)
    click.echo(
        f"{result.model}: {result.total} a run, {plural(result.threads, 'thread')}, "
        f"{result.gflops:.1f} GFLOP/s of nonzeros, {result.dense_gflops:.1f} dense-equivalent, {result.target}"
    )
    if not result.agrees:
        click.echo(
            f"skimtvm: warning: the layers take {result.layers_total * 1e3:.3f} ms together, a run without profiler "
            f"{result.total.median * 1e3:.3f} ms; profile on an idle machine, with a larger --repeat",
            err=True,
        )
