"""``skimtvm plot``: accuracy and sparsity of a training run over time."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("plot", short_help="Draw accuracy and sparsity of a training run.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG to write.  [default: RUN_DIR/plot.png]")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
def plot_command(run_dir: Path, output: Path | None, overwrite: bool) -> None:
    """Draw accuracy and per-layer sparsity over time from the metrics in RUN_DIR."""
    from ..prune.plot import plot

    click.echo(str(plot(run_dir, output, overwrite=overwrite)))
