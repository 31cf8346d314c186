"""``skimtvm train-demo``: train a small network, prune it while training, export it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ._common import print_table
from .compile import progress


class Epochs(click.ParamType):
    """``8+4+5``: epochs of dense training, of pruning, of fine-tuning."""

    name = "DENSE+PRUNE+TUNE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        parts = str(value).split("+")
        if len(parts) != 3 or not all(p.isdecimal() for p in parts):
            self.fail(f"'{value}' is not three numbers as in 8+4+5", param, ctx)
        a, b, c = (int(p) for p in parts)
        return a, b, c


@click.command("train-demo", short_help="Train, prune and export a small network.")
@click.option(
    "--runs", default="runs", show_default=True, type=click.Path(path_type=Path), help="Folder of run folders."
)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Run folder itself, instead of one named by the settings."
)
@click.option("--data", help="fashion, mnist5k, digits, or a folder of IDX files.  [default: fashion]")
@click.option("--network", help="cnn, small or mlp.  [default: cnn; mlp for the NumPy solver]")
@click.option("--solver", type=click.Choice(["torch", "numpy"]), help="What computes gradients.  [default: torch]")
@click.option("--method", help="dense, l1, surgery, ista, group, ramp or winograd.  [default: l1]")
@click.option("--sparsity", type=float, help="Share of zeros to reach.  [default: 0.925]")
@click.option("--decay", type=float, help="Strength of the penalty to begin with.")
@click.option("--steer/--no-steer", default=None, help="Correct the decay so that the sparsity is reached.")
@click.option("--block", type=click.IntRange(1, 64), help="Rows R of the R x 1 blocks of --method group.  [default: 4]")
@click.option("--epochs", type=Epochs(), help="Epochs of dense training, pruning and fine-tuning.  [default: 8+4+5]")
@click.option("--batch", type=click.IntRange(1, 65536), help="Images a step.  [default: 128]")
@click.option("--lr", type=float, help="Learning rate of the dense phase.  [default: 0.05]")
@click.option("--prune-lr", type=float, help="Learning rate of the other phases.  [default: 0.02]")
@click.option("--augment/--no-augment", default=None, help="Mirror and move images.  [default: on, off for digits]")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many training images.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of PyTorch; part of the result.  [default: 2]")
@click.option("--seed", type=click.IntRange(min=0), help="Of the weights and the order of the data.  [default: 0]")
@click.option("--guided", is_flag=True, help="Prune only layers that gain, as far as they gain.")
@click.option(
    "--alphas", help="JSON of the measured machine for --guided: alpha by layer or kernel, or of skimtvm bench."
)
@click.option("--start", help="Run folder whose dense weights to begin with.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Batches between checkpoints.  [default: 30 s]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def train_demo_command(
    runs: Path,
    run_dir: Path | None,
    checkpoint_every: int | None,
    as_json: bool,
    quiet: bool,
    guided: bool,
    alphas: str | None,
    **options: Any,
) -> None:
    """Train a small network, prune it while training, fine-tune it with the mask and write model.onnx.

    Started again with the same settings, it goes on where it was stopped.
    """
    from ..prune.demo import train
    from ..prune.rundir import Config

    given = {name: value for name, value in options.items() if value is not None}
    if given.get("solver") == "numpy":
        given.setdefault("network", "mlp")
    if given.get("data") in ("digits", "mnist5k"):
        given.setdefault("augment", False)  # a mirrored digit is another one, or none
        given.setdefault("network", "small")
    if guided or alphas is not None:
        from ..prune.guide import Machine

        given["guide"] = {} if alphas is None else Machine.load(alphas).record()
    config = Config(**given)
    folder = run_dir if run_dir is not None else runs / config.name
    with progress(quiet) as report:
        result = train(config, folder, progress=report, checkpoint_every=checkpoint_every)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"run": str(result.run)}))
        return
    if quiet:
        return
    columns = ("layer", "sparsity>", "guide") if config.guide is not None else ("layer", "sparsity>")
    rows = [(name, f"{share:.4f}", result.guide.get(name, "")) for name, share in result.layers.items()]
    print_table(columns, [row[: len(columns)] for row in rows])
    click.echo(
        f"{result.run}: top-1 {100 * result.dense_accuracy:.2f} % dense, {100 * result.accuracy:.2f} % at sparsity "
        f"{result.sparsity:.4f} ({result.seconds:.0f} s); model {result.run / 'model.onnx'}"
    )
