"""``skimtvm inspect``: what is in a compiled module or an ONNX file. Neither needs TVM."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import InvalidArtifact, InvalidModel
from ..report import Manifest
from ._common import LAYER_COLUMNS, file_size, layer_rows, number, plural, print_table, quantity, summary, tensors


@click.command("inspect", short_help="Show the layers of a .so or .onnx file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Show the layers of FILE: a compiled module (.so) or an ONNX model (.onnx)."""
    try:
        with open(file, "rb") as f:
            elf = f.read(4) == b"\x7fELF"
    except OSError as e:
        raise InvalidArtifact(f"'{file}' cannot be read: {e.strerror}; check its name and permissions") from None
    if elf or file.suffix == ".so":
        _show_module(file, as_json)
    else:
        _show_onnx(file, as_json)


def _show_module(file: Path, as_json: bool) -> None:
    from ..artifact import read_manifest

    manifest = read_manifest(file)
    if as_json:
        click.echo(module_json(manifest))
        return
    print_table(LAYER_COLUMNS, layer_rows(manifest.layers))
    click.echo(f"model    {manifest.model_name} (sha256 {manifest.model_sha256})")
    if manifest.batches:
        largest = manifest.batches[-1]
        click.echo(f"batches  {', '.join(map(str, manifest.batches))}; layers and shapes are those of {largest}")
    click.echo(f"inputs   {tensors(manifest.inputs)}")
    click.echo(f"outputs  {tensors(manifest.outputs)}")
    click.echo(f"target   {manifest.target}, needs {', '.join(manifest.features) or 'nothing special'}")
    tools = {"skimtvm": manifest.skimtvm_version, **manifest.tools}
    click.echo(f"made by  {', '.join(f'{name} {version}' for name, version in tools.items())}")
    click.echo(f"again    {recipe(manifest)}")
    click.echo(f"totals   {summary(manifest)}, {file_size(file)}")
    for warning in manifest.warnings:
        click.echo(f"warning  {warning}")


def recipe(manifest: Manifest) -> str:
    """The command that makes the same module from the same model file, with the tools that the manifest lists."""
    from .._compile import flags

    options = flags(manifest.options | {"target": manifest.target})
    return shlex.join(["skimtvm", "compile", "MODEL.onnx", "-o", "MODULE.so", *options])


def module_json(manifest: Manifest) -> str:
    """The manifest with the derived figures of each layer."""
    document = dataclasses.asdict(manifest)
    for raw, layer in zip(document["layers"], manifest.layers, strict=True):
        raw |= {"density": layer.density, "sparse": layer.sparse}
    return json.dumps(document, ensure_ascii=False)


@dataclass(frozen=True)
class OnnxLayer:
    """A node of an ONNX graph whose weights are constants, and how many of them are not zero."""

    name: str
    op: str
    shape: tuple[int, ...]
    weights: int
    nnz: int

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 1.0


def _show_onnx(file: Path, as_json: bool) -> None:
    layers = list(onnx_layers(file))
    weights, nnz = sum(layer.weights for layer in layers), sum(layer.nnz for layer in layers)
    if as_json:
        rows = [dataclasses.asdict(layer) | {"density": layer.density} for layer in layers]
        click.echo(json.dumps({"file": str(file), "weights": weights, "nnz": nnz, "layers": rows}, ensure_ascii=False))
        return
    print_table(
        ("layer", "op", "shape", "weights>", "nonzeros>", "density>"),
        [(x.name, x.op, "x".join(map(str, x.shape)), x.weights, x.nnz, number(x.density)) for x in layers],
    )
    density = f", density {nnz / weights:.3f}" if weights else ""
    click.echo(f"{file}: {plural(len(layers), 'layer')} with weights, {quantity(weights)} weights{density}")


_WEIGHTED = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}


def onnx_layers(file: Path) -> Iterator[OnnxLayer]:
    """Convolutions and matrix products of ``file`` with constant weights. Raises InvalidModel."""
    import numpy as np
    import onnx

    try:
        model = onnx.load(str(file))
        graph = model.graph
        constants = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    if attribute.name == "value":
                        constants[node.output[0]] = attribute.t
        if not graph.node:
            raise ValueError("no nodes")
    except Exception as e:  # protobuf, onnx and the file system each have their own
        reason = getattr(e, "strerror", None) or (str(e).strip().splitlines() or ["unreadable"])[0]
        raise InvalidModel(f"'{file}' is neither a module nor an ONNX model ({reason}); give a .so or .onnx") from None
    for node in graph.node:
        for k in _WEIGHTED.get(node.op_type, ()):
            if k < len(node.input) and node.input[k] in constants:
                array = _array(onnx, file, constants[node.input[k]])
                name = node.name or next((o for o in node.output if o), "?")
                yield OnnxLayer(name, node.op_type, array.shape, array.size, int(np.count_nonzero(array)))
                break


def _array(onnx: Any, file: Path, tensor: Any) -> Any:
    try:
        return onnx.numpy_helper.to_array(tensor, base_dir=str(file.parent))
    except Exception as e:
        reason = (str(e).strip().splitlines() or ["unreadable"])[0]
        raise InvalidModel(f"'{file}': tensor '{tensor.name}' is damaged ({reason}); export the model again") from None
