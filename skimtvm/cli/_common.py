"""Option types and tables that the subcommands share."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..report import LayerRecord, Manifest, TensorSpec

WIDE = 4000  # columns where nobody looks at a screen: a table in a file or a pipe is not cut


class Pair(click.ParamType):
    """``NAME=VALUE``. The name may contain ``=``, the value may not."""

    def __init__(self, metavar: str) -> None:
        self.name = metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, item = str(value).rpartition("=")
        if not equals or not name or not item:
            self.fail(f"'{value}' is not {self.name}", param, ctx)
        return name, item


class ShapePair(Pair):
    """``NAME=1,3,224,224``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, item = super().convert(value, param, ctx)
        try:
            shape = tuple(int(d) for d in item.split(",") if d.strip())
        except ValueError:
            shape = (0,)
        if any(d < 1 for d in shape):
            self.fail(f"'{value}': the dimensions must be whole numbers from 1, as in {self.name}", param, ctx)
        return name, shape


class Batches(click.ParamType):
    """``4`` or ``1,4,16``."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        words = str(value).split(",")
        if not all(w.strip().isdecimal() and int(w) > 0 for w in words):
            self.fail(f"'{value}': give a whole number from 1, or several as in 1,4,16", param, ctx)
        sizes = tuple(int(w) for w in words)
        return sizes[0] if len(sizes) == 1 else sizes


class Threads(click.ParamType):
    """A thread count, checked by the runtime's rule."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not str(value).isdecimal() or not 1 <= int(value) <= 1024:
            self.fail(f"'{value}' is not a number from 1 to 1024", param, ctx)
        return int(value)


def threads_option(command: Any) -> Any:
    text = "Threads to run on; all CPUs that this process may use if not given."
    return click.option("--threads", type=Threads(), help=text)(command)


def repeat_option(command: Any) -> Any:
    count = click.IntRange(1, 100000)
    return click.option("--repeat", default=20, show_default=True, type=count, help="Runs to take medians of.")(command)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; columns whose name ends in ``>`` are aligned right (the mark is not printed)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if screen else None, pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        table.add_column(Text(column.rstrip(">")), justify="right" if right else "left", no_wrap=right or not screen)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    if screen:
        Console().print(table)
        return
    text = io.StringIO()
    Console(file=text, width=WIDE).print(table)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def quantity(count: float) -> str:
    """``12.3 M`` for 12345678."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def file_size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def tensors(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name}: {s.dtype}[{','.join(map(str, s.shape))}]" for s in specs)


def layer_rows(layers: Iterable[LayerRecord]) -> list[tuple[object, ...]]:
    """The columns of LAYER_COLUMNS."""
    return [
        (
            layer.name,
            layer.op + (f" +{layer.epilogue}" if layer.epilogue else ""),
            layer.workload,
            layer.kernel,
            number(layer.density) if layer.weights else "",
            layer.nnz if layer.weights else "",
            layer.reason + (f"; {layer.knobs}" if layer.knobs else ""),
        )
        for layer in layers
    ]


LAYER_COLUMNS = ("layer", "op", "workload", "kernel", "density>", "nonzeros>", "why")


def summary(m: Manifest) -> str:
    """One line: how many layers have weights, how many are sparse, how dense the network is."""
    weighted = [layer for layer in m.layers if layer.weights]
    weights, nnz = sum(layer.weights for layer in weighted), sum(layer.nnz for layer in weighted)
    sparse = sum(layer.sparse for layer in weighted)
    density = f", density {nnz / weights:.3f}" if weights else ""
    return f"{plural(len(weighted), 'layer')} with weights, {sparse} sparse, {quantity(weights)} weights{density}"
