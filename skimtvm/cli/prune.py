"""``skimtvm prune``: prune an ONNX model by magnitude, without training."""

from __future__ import annotations

from pathlib import Path

import click

from ._common import file_size, number, plural, print_table, quantity


@click.command("prune", short_help="Prune an ONNX model by magnitude.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The model to write (.onnx).")
@click.option("--sparsity", type=float, help="Share of zeros in each layer, from 0 to below 1.")
@click.option("--table", type=click.Path(path_type=Path), help="JSON object of layer name or pattern: sparsity.")
@click.option(
    "--pattern",
    default="element",
    show_default=True,
    help="element, block4 (4x1), 4x2, filter, channel, column or 2:4.",
)
@click.option(
    "--keep", default="", help="Leave alone, by commas: first, last, depthwise, 1x1, conv, dense, or patterns of names."
)
@click.option("--global", "together", is_flag=True, help="One threshold for all layers together.")
@click.option("--guided", is_flag=True, help="Leave layers dense that would not be faster.")
@click.option(
    "--alphas", help="JSON of the measured machine for --guided: alpha by layer or kernel, or of skimtvm bench."
)
@click.option("--keep-channels", is_flag=True, help="Do not remove dead channels from the graph.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune_command(
    model: Path,
    output: Path,
    sparsity: float | None,
    table: Path | None,
    pattern: str,
    keep: str,
    together: bool,
    guided: bool,
    alphas: str | None,
    keep_channels: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Set the smallest weights of MODEL (.onnx) to zero and write the result."""
    from ..prune.guide import Machine
    from ..prune.oneshot import prune_file

    report = prune_file(
        model,
        output,
        overwrite=overwrite,
        sparsity=sparsity,
        table=table,
        pattern=pattern,
        keep=[word.strip() for word in keep.split(",")],
        together=together,
        remove_dead=not keep_channels,
        machine=Machine.load(alphas) if guided or alphas is not None else None,
    )
    if as_json:
        click.echo(report.to_json())
        return
    print_table(
        ("layer", "op", "shape", "weights>", "zeros before>", "zeros after>", "note"),
        [
            (
                x.name,
                x.op,
                "x".join(map(str, x.shape)),
                x.weights[1],
                number(x.sparsity[0]),
                number(x.sparsity[1]),
                "; ".join(
                    filter(None, [x.note, _channels(report.channels.get(x.name, 0)), report.stayed.get(x.name, "")])
                ),
            )
            for x in report.layers
        ],
    )
    (a, b), (p, q) = report.weights, report.nnz
    removed = sum(report.channels.values())
    dead = f", {plural(removed, 'dead channel')} removed" if removed else ""
    click.echo(
        f"{output}: {quantity(p)} of {quantity(a)} weights were not zero, now {quantity(q)} of {quantity(b)}"
        f" (sparsity {1 - q / b if b else 0:.4f}){dead}, {file_size(output)}"
    )


def _channels(count: int) -> str:
    return f"{plural(count, 'dead channel')} removed" if count else ""
