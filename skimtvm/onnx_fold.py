"""Simplify an ONNX graph in place: constant subgraphs, shape arithmetic, identities, dead nodes.

TVM folds a constant by compiling it; here ONNX's reference implementation does it in NumPy. Nothing here needs TVM.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.shape_inference
from onnx import TensorProto, numpy_helper

from .errors import InvalidModel
from .onnx_infer import TypeShape, infer
from .onnx_read import one_line, opset_of, subgraphs

FOLD_BYTES = 1 << 30  # a constant larger than this is left to be computed at run time
_ROUNDS = 30

# Results of these are not a function of their inputs, or are not one tensor.
_NEVER = frozenset(
    [
        *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"),
        *("If", "Loop", "Scan", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement", "ImageDecoder"),
        *("SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength"),
        *("SplitToSequence", "ConcatFromSequence", "StringNormalizer", "TfIdfVectorizer"),
    ]
)
# The output of these may be far larger than their inputs: they fold only where its size is known beforehand.
_GROWING = frozenset(
    [
        *("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "Upsample", "OneHot", "EyeLike"),
        *("CenterCropPad", "Einsum", "MatMul", "Gemm", "Conv"),
    ]
)
# Before opset 13 these work on a 2-D view, which the reference implementation does not model.
_SINCE_13 = frozenset(("Softmax", "LogSoftmax", "Hardmax"))


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _sparse_to_dense(sparse: Any) -> np.ndarray:
    dims = tuple(sparse.dims)
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(math.prod(dims), values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dims)
    dense[flat] = values
    return dense.reshape(dims)


def _constant(node: Any) -> Any:
    """TensorProto of a Constant node."""
    (name, value), *_ = _attributes(node).items()
    if name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    if name == "sparse_value":
        return numpy_helper.from_array(_sparse_to_dense(value), node.output[0])
    if name.startswith("value_string"):
        array = np.array(value, dtype=object)
    else:
        array = np.array(value, np.float32 if name.startswith("value_float") else np.int64)
    return numpy_helper.from_array(array, node.output[0])


def add_initializer(graph: Any, name: str, array: np.ndarray) -> None:
    """Append ``array`` to the initializers with one copy of its data."""
    plain = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}.get(array.dtype)
    if plain is None:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
    else:
        tensor = graph.initializer.add(name=name, data_type=plain, dims=array.shape)
        tensor.raw_data = array.tobytes()


def densify(model: Any) -> None:
    """Turn sparse initializers into dense ones, and Constant nodes of the main graph into initializers."""
    graph = model.graph
    try:
        for sparse in graph.sparse_initializer:
            graph.initializer.append(numpy_helper.from_array(_sparse_to_dense(sparse), sparse.values.name))
        del graph.sparse_initializer[:]
        keep = []
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                graph.initializer.append(_constant(node))
            else:
                keep.append(node)
    except (ValueError, IndexError, TypeError) as err:
        raise InvalidModel(f"model: a constant is malformed: {one_line(err)}") from None
    _replace(graph.node, keep)


def _replace(field: Any, items: list[Any]) -> None:
    """Replace the content of a repeated field by ``items``, which may be elements of that very field."""
    here, kept = {id(i) for i in field}, {id(i) for i in items}
    if kept <= here:  # only removals: no copy of weights
        for k in reversed(range(len(field))):
            if id(field[k]) not in kept:
                del field[k]
        return
    copies = [type(i).FromString(i.SerializePartialToString()) for i in items]
    del field[:]
    field.extend(copies)


def _direct(op: str, attrs: dict[str, Any], arrays: list[np.ndarray]) -> np.ndarray | None:
    """Result of operators that the reference implementation is slow at, or knows only since opset 11 or 13."""
    if op == "ConstantOfShape":
        fill = numpy_helper.to_array(attrs["value"]).reshape(-1)[0] if "value" in attrs else np.float32(0)
        return np.full(tuple(arrays[0]), fill)
    if op == "Identity":
        return arrays[0]
    if op == "Unsqueeze" and "axes" in attrs:
        return np.expand_dims(arrays[0], tuple(attrs["axes"]))
    if op == "Clip" and len(arrays) == 1:
        low, high = attrs.get("min", -np.inf), attrs.get("max", np.inf)
        return np.clip(arrays[0], low, high).astype(arrays[0].dtype)
    return None


class _Folder:
    """One round over the nodes of the main graph."""

    def __init__(self, model: Any, types: dict[str, TypeShape], shapes: bool = True):
        self.graph, self.types, self.shapes = model.graph, types, shapes
        self.opset = opset_of(model)
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.tensors = {t.name: t for t in self.graph.initializer}
        self.arrays: dict[str, np.ndarray] = {}
        self.inlined = 0

    def array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            self.arrays[name] = numpy_helper.to_array(self.tensors[name])
        return self.arrays[name]

    def is_const(self, name: str) -> bool:
        return name in self.arrays or name in self.tensors

    def _small(self, node: Any) -> bool:
        sizes = [self.types.get(o, (0, None))[1] for o in node.output if o]
        if any(shape is None for shape in sizes):
            return node.op_type not in _GROWING
        return all(math.prod(shape) * 4 <= FOLD_BYTES for shape in sizes if shape)

    def _shape_of(self, node: Any) -> np.ndarray | None:
        shape = self.types.get(node.input[0], (0, None))[1]
        if shape is None:
            return None
        if node.op_type == "Size":
            return np.array(math.prod(shape), np.int64)
        attrs = _attributes(node)
        return np.array(shape[slice(attrs.get("start", 0), attrs.get("end"))], np.int64)

    def evaluate(self, node: Any) -> list[np.ndarray] | None:
        """Outputs of ``node`` if they are constant and cheap to keep, else None."""
        op = node.op_type
        if node.domain not in ("", "ai.onnx") or op in _NEVER or any(True for _ in subgraphs(node)):
            return None
        if self.shapes and op in ("Shape", "Size") and (value := self._shape_of(node)) is not None:
            return [value]
        if not node.input or not all(self.is_const(i) for i in node.input if i) or not self._small(node):
            return None
        if op in _SINCE_13 and self.opset < 13:
            return None
        direct = _direct(op, _attributes(node), [self.array(i) for i in node.input if i])
        if direct is not None:
            return [direct]
        from onnx.reference import ReferenceEvaluator

        try:
            feeds = {i: self.array(i) for i in node.input if i}
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds)
        except Exception:  # an operator that NumPy cannot do stays in the graph, and is reported there if it must
            return None
        arrays = [np.asarray(r) for r in results]
        return arrays if sum(a.nbytes for a in arrays) <= FOLD_BYTES else None

    def inline_if(self, node: Any) -> list[Any] | None:
        """Nodes of the branch that an If with a constant condition takes, or None."""
        if node.op_type != "If" or not node.input or not self.is_const(node.input[0]):
            return None
        chosen = "then_branch" if bool(self.array(node.input[0]).reshape(-1)[0]) else "else_branch"
        branch = _attributes(node)[chosen]
        self.inlined += 1
        prefix = f"{node.output[0]}/{chosen}/"
        inner = {o for n in branch.node for o in n.output if o} | {t.name for t in branch.initializer}
        rename = {name: prefix + name for name in inner}
        for tensor in branch.initializer:
            tensor.name = rename[tensor.name]
            self.graph.initializer.append(tensor)
            self.tensors[tensor.name] = self.graph.initializer[-1]
        for inner_node in branch.node:
            rename_values(inner_node, rename)
        nodes = list(branch.node)
        for value, outer in zip(branch.output, node.output, strict=True):
            nodes.append(onnx.helper.make_node("Identity", [rename.get(value.name, value.name)], [outer]))
        return nodes

    def run(self) -> bool:
        """Fold what can be folded; True if the graph changed."""
        keep: list[Any] = []
        changed = False
        for node in self.graph.node:
            branch = self.inline_if(node)
            if branch is not None:
                keep += branch
                changed = True
                continue
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):  # from an inlined branch
                tensor = _constant(node)
                results: list[np.ndarray] | None = [numpy_helper.to_array(tensor)]
            else:
                results = self.evaluate(node)
            if results is None:
                keep.append(node)
                continue
            changed = True
            for name, array in zip(node.output, results, strict=False):
                if name:
                    self.arrays[name] = array
        if changed:
            used = {i for n in keep for i in used_names(n)} | {o.name for o in self.graph.output}
            for name, array in self.arrays.items():
                if name not in self.tensors and name in used:
                    add_initializer(self.graph, name, array)
            _replace(self.graph.node, keep)
        return changed


def used_names(node: Any) -> Iterator[str]:
    """Names that ``node`` reads, those that its subgraphs take from outside included."""
    yield from (i for i in node.input if i)
    for sub in subgraphs(node):
        for inner in sub.node:
            yield from used_names(inner)
        yield from (o.name for o in sub.output)


def rename_values(node: Any, names: dict[str, str]) -> None:
    """Rename inputs and outputs of ``node``, and what its subgraphs take from outside."""
    for field in (node.input, node.output):
        for k, name in enumerate(field):
            if name in names:
                field[k] = names[name]
    for sub in subgraphs(node):
        own = {o for n in sub.node for o in n.output} | {t.name for t in sub.initializer} | {i.name for i in sub.input}
        outer = {k: v for k, v in names.items() if k not in own}
        for inner in sub.node:
            rename_values(inner, outer)
        for value in sub.output:
            value.name = outer.get(value.name, value.name)


def drop_dead(model: Any) -> None:
    """Remove nodes, initializers and optional outputs that no graph output depends on."""
    graph = model.graph
    live = {o.name for o in graph.output}
    keep = []
    for node in reversed(graph.node):
        if any(o in live for o in node.output if o):
            keep.append(node)
            live.update(used_names(node))
    _replace(graph.node, keep[::-1])
    for node in graph.node:
        _drop_optional_outputs(node, live, opset_of(model))
    _replace(graph.initializer, [t for t in graph.initializer if t.name in live])


def _drop_optional_outputs(node: Any, live: set[str], opset: int) -> None:
    if len(node.output) < 2 or node.output[-1] in live or node.domain not in ("", "ai.onnx"):
        return
    try:
        formal = onnx.defs.get_schema(node.op_type, opset).outputs
    except onnx.defs.SchemaError:
        return
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    while len(node.output) > 1 and node.output[-1] not in live:
        k = len(node.output) - 1
        if k >= len(formal) or formal[k].option != optional:
            return
        node.output.pop()


def _is_identity(folder: _Folder, node: Any, live: set[str]) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        known = folder.types.get(node.input[0], (0, None))[0]
        return known != 0 and known == _attributes(node).get("to")
    if node.op_type == "Dropout":
        training = node.input[2] if len(node.input) > 2 else ""
        off = not training or (folder.is_const(training) and not bool(folder.array(training).reshape(-1)[0]))
        return off and not any(o in live for o in list(node.output)[1:])
    return False


def drop_identities(model: Any, types: dict[str, TypeShape]) -> bool:
    """Remove Identity, Cast to the type that a value has, and Dropout (at inference); True if the graph changed."""
    graph = model.graph
    folder = _Folder(model, types)
    outputs = {o.name for o in graph.output}
    live = outputs | {i for n in graph.node for i in used_names(n)}
    produced = {o for n in graph.node for o in n.output if o}
    names: dict[str, str] = {}
    keep = []
    for node in graph.node:
        rename_values(node, names)
        if not _is_identity(folder, node, live):
            keep.append(node)
            continue
        source, result = node.input[0], node.output[0]
        if result not in outputs:
            names[result] = source
        elif source in produced and source not in outputs:
            # The value takes the name that the user knows; its producer and its earlier readers come before this node.
            for earlier in keep:
                rename_values(earlier, {source: result})
            names = {k: result if v == source else v for k, v in names.items()}
            names[source] = result
            produced.add(result)
        else:
            keep.append(node)
    changed = len(keep) != len(graph.node)
    _replace(graph.node, keep)
    return changed


def fold(model: Any, *, shapes: bool = True) -> dict[str, TypeShape]:
    """Simplify until nothing changes; returns the types and shapes of what is left.

    ``shapes``: the shapes of the graph inputs are final, and what the graph computes from them is constant too.
    """
    types: dict[str, TypeShape] = {}
    for _ in range(_ROUNDS):
        types = infer(model)
        changed = _Folder(model, types, shapes).run()
        changed |= drop_identities(model, types)
        drop_dead(model)
        if not changed:
            break
    return types
