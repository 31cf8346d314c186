"""``skimtvm log``: look at tuning logs, join them, and throw out what is not needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._common import number, plural, print_table

if TYPE_CHECKING:
    from ..tune.log import Record

_FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.group("log", short_help="Show, merge and prune tuning logs.")
def log_command() -> None:
    """Tuning logs: folders of <cpu>/<kernel>.jsonl, one record a line."""


def _read(folder: Path) -> tuple[Record, ...]:
    from ..errors import InvalidOption
    from ..tune.log import Log

    if not folder.is_dir():
        raise InvalidOption(f"tuning log '{folder}' is no folder; give what skimtvm tune --log wrote")
    log = Log.read(folder)
    for damage in log.damage:
        click.echo(f"skimtvm: warning: {damage}", err=True)
    return log.records


@log_command.command("show", short_help="How many records of which kernels.")
@_FOLDER
def show_command(folder: Path) -> None:
    """Count the records of FOLDER by CPU and kernel; damaged lines are named on stderr."""
    counts: Counter[tuple[str, str, str]] = Counter()
    kinds: dict[tuple[str, str, str], Counter[str]] = {}
    for r in _read(folder):
        key = (r.cpu, r.kernel, r.version)
        counts[key] += 1
        kinds.setdefault(key, Counter())["failed" if r.error else r.kind] += 1
    columns = ("cpu", "kernel", "version", "trials>", "failed>", "best>")
    print_table(columns, [(*k, kinds[k]["trial"], kinds[k]["failed"], kinds[k]["best"]) for k in sorted(counts)])
    click.echo(f"{folder}: {plural(sum(counts.values()), 'record')}")


@log_command.command("best", short_help="The best record of each workload.")
@_FOLDER
def best_command(folder: Path) -> None:
    """Print the newest best record of each workload in FOLDER."""
    from ..tune.log import Log

    best = Log(_read(folder)).best().values()
    columns = (
        "cpu",
        "kernel",
        "workload",
        "density>",
        "threads>",
        "default, ms>",
        "best, ms>",
        "gain>",
        "knobs",
        "time",
    )
    rows = [
        (
            r.cpu, r.kernel, r.workload, number(r.sparsity.density), r.threads, number((r.default_s or 0) * 1e3, 4),
            number((r.median_s or 0) * 1e3, 4), f"{r.gain:.3f}x",
            "default" if r.is_default else " ".join(f"{k}={int(v)}" for k, v in r.knobs.items()), r.time,
        )
        for r in best
    ]  # fmt: skip
    print_table(columns, rows)


@log_command.command("merge", short_help="Add the records of other logs.")
@_FOLDER
@click.argument("sources", type=click.Path(path_type=Path, file_okay=False), nargs=-1, required=True)
def merge_command(folder: Path, sources: tuple[Path, ...]) -> None:
    """Add to FOLDER the records of SOURCES that it does not hold."""
    from ..tune.log import merge

    for source in sources:
        _read(source)
    click.echo(f"{folder}: {plural(merge(folder, sources), 'record')} added")


@log_command.command("prune", short_help="Keep the best records only.")
@_FOLDER
@click.option("--stale", is_flag=True, help="Drop records of other versions of the kernels, too (needs TVM).")
def prune_command(folder: Path, stale: bool) -> None:
    """Keep the newest best record of each workload in FOLDER; trials and damaged lines go."""
    from ..tune.log import prune

    _read(folder)
    if stale:
        from ..tvm_runtime import import_compiler

        import_compiler()
        from ..schedules.sites import version
        from ..target import TARGETS

        before, after = prune(folder, lambda r: r.cpu in TARGETS and r.version == version(r.kernel, TARGETS[r.cpu]))
    else:
        before, after = prune(folder)
    click.echo(f"{folder}: {plural(before, 'line')} before, {plural(after, 'record')} kept")
