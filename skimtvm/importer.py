"""ONNX file to Relax module: the first phase of the compiler.

``prepare_onnx`` checks and cleans a model in ONNX itself and needs no TVM; ``load_model`` goes on to Relax. Each
convolution and matrix product of the result carries the name of its ONNX node, see ``layer_name``.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.helper
import onnx.inliner
from onnx import TensorProto

from .errors import EnvironmentProblem, InvalidModel
from .onnx_expand import expand, upgrade
from .onnx_fold import densify, drop_dead, fold
from .onnx_infer import limit_steps
from .onnx_read import MIN_OPSET, graphs, one_line, opset_of, read_model
from .onnx_shapes import change_batch, resolve_inputs, set_input_shapes
from .onnx_types import check_types, odd_weights, to_float32
from .onnx_winograd import inline_functions
from .report import TensorSpec

TVM_VERSION = "0.27."
FFI_VERSION = "0.1.14"
FFI_REQUIREMENT = "apache-tvm-ffi==0.1.14.post1"


@dataclass(frozen=True)
class PreparedOnnx:
    """A cleaned model: constants folded, weights float32 initializers, static input shapes, unique node names.

    ``inputs``: name, shape and dtype of each graph input; ``sha256``: of the file and its external data as read;
    ``winograd``: (m, r) of the Conv nodes that stand for native Winograd layers, by name (see ``onnx_winograd``).
    """

    model: Any  # onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    sha256: str
    name: str
    opset: int
    warnings: tuple[str, ...]
    winograd: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedModel:
    """``mod``: module whose Relax function ``main`` has static shapes and one dataflow block; TVM imports a few
    operators (Pad) as call_tir of a PrimFunc beside it. The parameters of ``main`` are ``inputs`` in order, with names
    made into identifiers; its result is ``outputs``, a tuple if there are several. ``winograd``: see PreparedOnnx."""

    mod: Any  # tvm.ir.IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str
    name: str
    opset: int
    warnings: tuple[str, ...]
    winograd: dict[str, tuple[int, int]] = field(default_factory=dict)


def check_environment() -> None:
    """Raise EnvironmentProblem if the installed TVM or tvm-ffi is missing or of another release.

    Other builds of tvm-ffi import fine and then crash inside passes, so this looks before anything is imported.
    """
    for package, prefix, requirement in (
        ("apache-tvm", TVM_VERSION, "apache-tvm==0.27.0.post1"),
        ("apache-tvm-ffi", FFI_VERSION, FFI_REQUIREMENT),
    ):
        remedy = f'install the right one with: pip install "{requirement}"'
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise EnvironmentProblem(f"{package} is not installed; {remedy}") from None
        if not (version + ".").startswith(prefix if prefix.endswith(".") else prefix + "."):
            raise EnvironmentProblem(f"{package} {version} does not work with SkimTVM; {remedy}")


def prepare_onnx(
    source: str | os.PathLike[str] | bytes | Any,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    keep_winograd: bool = False,
) -> PreparedOnnx:
    """Read, check and clean a model (path, bytes or onnx.ModelProto, which is not modified).

    ``input_shapes``: whole shape of an input by name; ``batch``: first dimension of every input; ``keep_winograd``:
    leave native Winograd layers whole, as Conv nodes that must not be computed. Raises InvalidModel
    (not a sound ONNX model), InvalidOption (shapes that do not fit), UnboundShape and UnsupportedModel.
    """
    try:
        return _prepare(source, input_shapes, batch, keep_winograd)
    except UnicodeDecodeError:  # protobuf decodes names when they are read, not when it parses the file
        raise InvalidModel("model: holds a name that is not UTF-8, so it is damaged; export or copy it again") from None


def _prepare(
    source: Any, input_shapes: Mapping[str, Sequence[int]] | None, batch: int | None, keep_winograd: bool
) -> PreparedOnnx:
    model, sha256, name = read_model(source)
    layers: dict[str, tuple[int, int]] = {}
    if keep_winograd:
        model, layers = inline_functions(model)
    elif model.functions:
        model = onnx.inliner.inline_local_functions(model)
        del model.functions[:]
    if opset_of(model) < MIN_OPSET:
        model = upgrade(model)
    densify(model)
    shapes, rebatch = resolve_inputs(model, input_shapes, batch)
    drop_dead(model)
    fold(model, shapes=False)
    limit_steps(model)
    if rebatch is not None:
        change_batch(model, shapes, *rebatch)
    set_input_shapes(model, shapes)
    fold(model)
    if expand(model):
        fold(model)
    limit_steps(model)
    warnings = []
    converted = to_float32(model)
    if converted:
        fold(model)
        floats = [v.name for v in model.graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT]
        warnings.append(
            f"{' and '.join(converted)} are computed as float32: weights were converted, and the module takes and "
            f"returns float32 (inputs: {', '.join(map(repr, floats)) or 'none'})"
        )
    check_types(model)
    _name_nodes(model.graph)
    warnings += odd_weights(model.graph)
    inputs = tuple(
        TensorSpec(v.name, shapes[v.name], str(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)))
        for v in model.graph.input
    )
    outputs = tuple(o.name for o in model.graph.output)
    winograd = {n.name: layers[n.output[0]] for n in model.graph.node if n.output[0] in layers}
    return PreparedOnnx(model, inputs, outputs, sha256, name, opset_of(model), tuple(warnings), winograd)


def _name_nodes(graph: Any) -> None:
    """Give every node a unique name: its own, or that of its first output where it has none or shares it."""
    nodes = [node for g in graphs(graph) for node in g.node]
    count: dict[str, int] = {}
    for node in nodes:
        count[node.name] = count.get(node.name, 0) + 1
    taken = {name for name, n in count.items() if n == 1 and name}
    for node in nodes:
        if node.name and count[node.name] == 1:
            continue
        base = next((o for o in node.output if o), None) or node.op_type
        name, k = base, 0
        while name in taken:
            k += 1
            name = f"{base}.{k}"
        taken.add(name)
        node.name = name


def load_model(
    source: str | os.PathLike[str] | bytes | Any,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
) -> ImportedModel:
    """Prepare a model (see ``prepare_onnx`` for arguments and errors) and convert it to Relax.

    Raises also EnvironmentProblem, and UnsupportedModel naming every operator that cannot be converted.
    """
    check_environment()
    prepared = prepare_onnx(source, input_shapes=input_shapes, batch=batch, keep_winograd=True)
    from .onnx_to_relax import convert

    mod, results = convert(prepared.model, prepared.opset)
    p = prepared
    outputs = tuple(TensorSpec(name, *result) for name, result in zip(p.outputs, results, strict=True))
    return ImportedModel(mod, p.inputs, outputs, p.sha256, p.name, p.opset, p.warnings, p.winograd)


def layer_name(call: Any) -> str | None:
    """Name of the ONNX node that a relax.Call came from; None where it carries none."""
    span = getattr(call, "span", None)
    source = getattr(span, "source_name", None)
    return one_line(source.name, 1000) if source is not None else None
