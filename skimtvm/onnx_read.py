"""Read an ONNX model from a path, bytes or a ModelProto, with external data loaded only from beside the model file.

Nothing here needs TVM. Every defect of the input becomes an InvalidModel with a one-line message.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx.checker
import onnx.defs
from onnx import TensorProto

from .errors import InvalidModel, UnsupportedModel

MIN_OPSET = 7
INLINE_ELEMENTS = 1024  # larger weights are left out of the copies that go to the checker and to shape inference


def one_line(text: object, limit: int = 300) -> str:
    """``text`` with all white space collapsed, cut to ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def subgraphs(node: Any) -> Iterator[Any]:
    """The graphs in the attributes of a NodeProto (branches of If, bodies of Loop and Scan)."""
    for attr in node.attribute:
        if attr.type == onnx.AttributeProto.GRAPH or attr.HasField("g"):
            yield attr.g
        yield from attr.graphs


def graphs(graph: Any) -> Iterator[Any]:
    """``graph`` and all graphs nested in it."""
    yield graph
    for node in graph.node:
        for sub in subgraphs(node):
            yield from graphs(sub)


def _node_tensors(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors
            for sparse in ([attr.sparse_tensor] if attr.HasField("sparse_tensor") else []) + list(attr.sparse_tensors):
                yield sparse.values
                yield sparse.indices


def tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto of the model: initializers, sparse ones, and attributes, in subgraphs and functions too."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        yield from _node_tensors(graph.node)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for node in function.node:
            for sub in subgraphs(node):
                for graph in graphs(sub):
                    yield from graph.initializer
                    yield from _node_tensors(graph.node)


def element_bits(data_type: int) -> int | None:
    """Bits of one element in ``raw_data``; None for strings and unknown types."""
    if data_type == TensorProto.STRING:
        return None
    names = {v: k for k, v in TensorProto.DataType.items()}
    name = names.get(data_type, "")
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return 4
    if name in ("INT2", "UINT2"):
        return 2
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8
    except (KeyError, ValueError, TypeError):
        return None


def _expected_bytes(tensor: Any) -> int | None:
    bits = element_bits(tensor.data_type)
    return None if bits is None else (math.prod(tensor.dims) * bits + 7) // 8


def _open_source(path: Path) -> bytes:
    shown = str(path)
    try:
        if path.is_dir():
            raise InvalidModel(f"{shown}: is a directory; give the path of an .onnx file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InvalidModel(f"{shown}: no such file; give the path of an .onnx file") from None
    except (OSError, ValueError) as err:
        raise InvalidModel(f"{shown}: cannot be read: {one_line(getattr(err, 'strerror', None) or err)}") from None
    if data.startswith(b"version https://git-lfs"):
        raise InvalidModel(f"{shown}: is a Git LFS pointer, not the model; fetch the file with: git lfs pull")
    return data


def _parse(data: bytes, where: str) -> Any:
    if not data:
        raise InvalidModel(f"{where}: is empty; an ONNX model was expected")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # DecodeError; protobuf's back ends raise different classes
        raise InvalidModel(
            f"{where}: is not an ONNX model, or is truncated (protobuf cannot decode it); export or copy it again"
        ) from None
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise InvalidModel(
            f"{where}: is not an ONNX model, or is truncated: it holds no graph; export or copy it again"
        )
    return model


def _inside(base: Path, tensor: Any, location: str) -> Path:
    what = f"tensor '{tensor.name}': external data location '{one_line(location, 120)}'"
    remedy = "external data must lie in the directory of the model; save the model again with its weights beside it"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location:
        raise InvalidModel(f"{what} is not a file name; {remedy}")
    if location.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts:
        raise InvalidModel(f"{what} leaves the directory of the model; {remedy}")
    try:
        path = Path(os.path.realpath(base / location))
        if not path.is_relative_to(os.path.realpath(base)):
            raise InvalidModel(f"{what} leads out of the directory of the model through a symbolic link; {remedy}")
        if not path.is_file():
            raise InvalidModel(f"{what}: there is no such file beside the model; {remedy}")
    except OSError as err:
        raise InvalidModel(f"{what} cannot be read: {one_line(err.strerror or err)}; {remedy}") from None
    return path


def _number(tensor: Any, entries: dict[str, str], key: str) -> int | None:
    if key not in entries:
        return None
    try:
        value = int(entries[key])
    except ValueError:
        value = -1
    if value < 0:
        raise InvalidModel(
            f"tensor '{tensor.name}': external data {key} '{one_line(entries[key], 40)}' is not a count of bytes"
        )
    return value


def _load_external(tensor: Any, base: Path | None, files: dict[Path, BinaryIO], digest: Any) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise InvalidModel(
            f"tensor '{tensor.name}': its data are in the external file '{one_line(location, 120)}', which a model "
            "given as bytes or ModelProto does not locate; pass the path of the .onnx file"
        )
    path = _inside(base, tensor, location)
    offset = _number(tensor, entries, "offset") or 0
    expected = _expected_bytes(tensor)
    if expected is None or any(d < 0 for d in tensor.dims):
        raise InvalidModel(f"tensor '{tensor.name}': its type or shape cannot have external data")
    length = _number(tensor, entries, "length")
    if length is not None and length != expected:
        raise InvalidModel(
            f"tensor '{tensor.name}': its shape needs {expected} bytes, but the model says that {length} are in "
            f"'{location}'; save the model again"
        )
    try:
        if path not in files:
            files[path] = path.open("rb")
        file = files[path]
        size = os.fstat(file.fileno()).st_size
        if offset + expected > size:
            raise InvalidModel(
                f"tensor '{tensor.name}': external file '{location}' is truncated: it has {size} bytes and "
                f"{offset + expected} are needed; copy it again"
            )
        file.seek(offset)
        data = file.read(expected)
    except OSError as err:
        raise InvalidModel(
            f"tensor '{tensor.name}': cannot read '{location}': {one_line(err.strerror or err)}"
        ) from None
    if len(data) != expected:
        raise InvalidModel(f"tensor '{tensor.name}': external file '{location}' changed while it was read; try again")
    digest.update(data)
    tensor.raw_data = data
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def load_external_data(model: Any, base: Path | None, digest: Any) -> None:
    """Put external data into the model. ``base``: directory of the model file, None where there is no file.

    Raises InvalidModel for a location outside of ``base`` and for missing or short files.
    """
    files: dict[Path, BinaryIO] = {}
    try:
        for tensor in tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                _load_external(tensor, base, files, digest)
    finally:
        for file in files.values():
            file.close()


def _check_names(model: Any, where: str) -> None:
    """Refuse names that are not UTF-8: protobuf hands them out as bytes, which nothing else expects."""
    names = [model.graph.name, *(t.name for t in tensors(model)), *(o.domain for o in model.opset_import)]
    for graph in graphs(model.graph):
        names += [v.name for v in (*graph.input, *graph.output)]
        for node in graph.node:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    bad = next((name for name in names if isinstance(name, bytes)), None)
    if bad is not None:
        raise InvalidModel(
            f"{where}: the name {bad[:60]!r} is not UTF-8, so the file is damaged; export or copy it again"
        )


def _typed_elements(tensor: Any) -> int:
    """Elements in the typed field of a tensor without raw_data."""
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return max(len(tensor.float_data), len(tensor.double_data)) // 2
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return max(*map(len, fields), len(tensor.string_data))


def check_tensor_sizes(model: Any) -> None:
    """Raise InvalidModel where a tensor holds another number of elements than its shape needs."""
    for tensor in tensors(model):
        what = f"tensor '{tensor.name}': shape {one_line(list(tensor.dims), 80)}"
        if any(d < 0 for d in tensor.dims):
            raise InvalidModel(f"{what} has a negative dimension; the file is damaged, export it again")
        bits, count = element_bits(tensor.data_type), math.prod(tensor.dims)
        need, have, unit = count, 0, "elements"
        if bits is None and tensor.data_type != TensorProto.STRING:
            raise InvalidModel(
                f"{what} has unknown element type {tensor.data_type}; the file is damaged, export it again"
            )
        if tensor.HasField("raw_data") and bits is not None:
            need, have, unit = (count * bits + 7) // 8, len(tensor.raw_data), "bytes"
        else:
            have = _typed_elements(tensor)
            if bits is not None and bits < 8:
                need = -(-count // (8 // bits))
        if have != need:
            raise InvalidModel(
                f"{what} needs {need} {unit} but the model holds {have}; the file is damaged, export it again"
            )


def skeleton(model: Any, *, with_value_info: bool = False) -> Any:
    """A copy of ``model`` in which large initializers are graph inputs of the same type, so that copying is cheap."""
    copy = onnx.ModelProto(ir_version=max(4, model.ir_version))
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.name = model.graph.name or "main"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    if with_value_info:
        graph.value_info.extend(model.graph.value_info)
    inputs = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= INLINE_ELEMENTS:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def opset_of(model: Any) -> int:
    """Version of the default operator set; 0 where the model names none."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _check(model: Any, where: str) -> None:
    opset, newest = opset_of(model), onnx.defs.onnx_opset_version()
    if opset == 0:
        if model.opset_import:
            raise UnsupportedModel(
                f"{where}: imports no operator set of ONNX itself; export it with opset {MIN_OPSET} or newer"
            )
        raise InvalidModel(
            f"{where}: names no operator set (opset_import), it may be truncated; export or copy it again"
        )
    if opset > newest:
        raise UnsupportedModel(
            f"{where}: opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows; "
            f"export it with opset {newest} or older"
        )
    check_tensor_sizes(model)
    copy = skeleton(model)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.HasField("tensor_type"):  # the checker insists on a shape, which is in fact optional
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(copy)
    except Exception as err:  # ValidationError, or whatever the bindings raise
        raise InvalidModel(f"{where}: breaks the rules of ONNX: {one_line(err)}") from None


def read_model(source: str | os.PathLike[str] | bytes | Any) -> tuple[Any, str, str]:
    """Read and check a model; the result is a private copy with all data in it.

    Returns (ModelProto, SHA-256 of the model and its external data, name). Raises InvalidModel for anything that is
    not a sound ONNX model and UnsupportedModel for opsets outside of the supported range.
    """
    base: Path | None = None
    if isinstance(source, onnx.ModelProto):
        where, name = "model", source.graph.name or "model"
        if not source.HasField("graph") or not (source.graph.node or source.graph.output):
            raise InvalidModel("model: the ModelProto holds no graph; export it again")
        model = onnx.ModelProto()
        model.CopyFrom(source)
        digest = hashlib.sha256(skeleton(model, with_value_info=True).SerializeToString(deterministic=True))
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) > INLINE_ELEMENTS:
                digest.update(tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes())
    else:
        if isinstance(source, (bytes, bytearray, memoryview)):
            where, data = "model", bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            path = Path(source)
            where, data, base = str(path), _open_source(path), path.parent
        else:
            raise InvalidModel(f"model: a path, bytes or onnx.ModelProto was expected, not {type(source).__name__}")
        model = _parse(data, where)
        name = (Path(where).stem if base else model.graph.name) or "model"
        digest = hashlib.sha256(data)
        del data
    model.ir_version = max(4, model.ir_version)
    _check_names(model, where)
    load_external_data(model, base, digest)
    names = {t.name for t in model.graph.initializer} | {s.values.name for s in model.graph.sparse_initializer}
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    del model.training_info[:]
    _check(model, where)
    return model, digest.hexdigest(), name
