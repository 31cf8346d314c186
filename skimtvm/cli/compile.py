"""``skimtvm compile``: ONNX file to .so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ._common import LAYER_COLUMNS, Batches, Pair, ShapePair, file_size, layer_rows, print_table, summary


@click.command("compile", short_help="Compile an ONNX model to a .so.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The module to write (.so).")
@click.option("--target", default="auto", show_default=True, help="LLVM CPU name, or auto for this machine.")
@click.option(
    "--batch",
    type=Batches(),
    help="First dimension of the inputs; several (1,4,16) make a module that takes any number of images.",
)
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    type=ShapePair("NAME=1,3,224,224"),
    help="Shape of an input with free dimensions; repeat for each.",
)
@click.option(
    "--sparse-threshold",
    type=click.FloatRange(0, 1),
    help="Use sparse kernels up to this density; by default each layer's kernels are compared.",
)
@click.option("--force", multiple=True, type=Pair("LAYER=KERNEL"), help="Kernel of one layer; repeat for more.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Folder for the IR after each phase.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), help="Relative error that optimisations may add."
)
@click.option("--log", help="Tuning log to use before the one that comes with the package; none for default knobs.")
@click.option(
    "--calibration",
    help="File of skimtvm calibrate to choose kernels by; none for the built-in model.  [default: shipped]",
)
@click.option("--explain", is_flag=True, help="Print each layer's kernel and why it was chosen.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def compile_command(model: Path, output: Path, explain: bool, overwrite: bool, quiet: bool, **options: Any) -> None:
    """Compile MODEL (.onnx) to a shared library with kernels for its sparsity."""
    from .. import artifact

    artifact.check_output(output, overwrite=overwrite)
    from ..tvm_runtime import import_compiler

    import_compiler()
    from .._compile import make_options
    from ..compiler import compile_model

    given = {name: value for name, value in options.items() if value is not None}
    chosen = make_options(given)
    with progress(quiet) as report:
        compiled = compile_model(model, chosen, progress=report)
        artifact.write(compiled, output, overwrite=overwrite)
    if quiet:
        return
    manifest = compiled.manifest
    for warning in manifest.warnings:
        print(f"skimtvm: warning: {' '.join(warning.split())}", file=sys.stderr)
    if explain:
        print_table(LAYER_COLUMNS, layer_rows(manifest.layers))
        print(f"kernels chosen by the {manifest.choice}")
    batches = f"batches {', '.join(map(str, manifest.batches))}, " if manifest.batches else ""
    print(f"{output}: {summary(manifest)}, {batches}target {manifest.target}, {file_size(output)}")


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, float], None] | None]:
    """A progress bar on stderr if that is a screen; otherwise nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("import", total=1.0)
        yield lambda phase, done: bar.update(task, description=phase.replace("[", r"\["), completed=done)
