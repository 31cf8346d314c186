"""Types and shapes of the tensors of an ONNX model, by ONNX's own shape inference. Nothing here needs TVM."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import TensorProto, numpy_helper

from .onnx_read import graphs, skeleton

TypeShape = tuple[int, tuple[int, ...] | None]


def static_shape(value: Any) -> tuple[int, ...] | None:
    """Shape of a ValueInfoProto if every dimension has a value."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


MOST_STEP = 1 << 30  # of a Slice; longer than any axis


def _steps(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Each Slice that has steps, with its graph and the steps: an array of integers, None where they are no constant."""
    constants: dict[str, Any] = {}
    for graph in graphs(model.graph):  # outer graphs first: their names are known in the inner ones
        constants.update({t.name: t for t in graph.initializer})
        for node in graph.node:
            if node.op_type == "Constant":
                constants.update({o: a.t for o in node.output for a in node.attribute if a.name == "value"})
            elif node.op_type == "Slice" and len(node.input) > 4 and node.input[4]:
                tensor = constants.get(node.input[4])
                whole = tensor is not None and tensor.data_type in (TensorProto.INT32, TensorProto.INT64)
                yield graph, node, numpy_helper.to_array(tensor) if whole else None


def _is_long(steps: Any) -> bool:
    return bool(np.any((steps > MOST_STEP) | (steps < -MOST_STEP)))


def limit_steps(model: Any) -> None:
    """Give a Slice with a constant step beyond MOST_STEP that step in place, which has the same result.

    ONNX's shape inference and TVM's overflow with larger ones.
    """
    changes = [(graph, node, steps) for graph, node, steps in _steps(model) if steps is not None and _is_long(steps)]
    taken = {name for graph in graphs(model.graph) for node in graph.node for name in (*node.input, *node.output)}
    for graph, node, steps in changes:
        name = next(n for n in (f"{node.input[4]}.limited{k}" for k in count()) if n not in taken)
        taken.add(name)
        graph.initializer.append(numpy_helper.from_array(steps.clip(-MOST_STEP, MOST_STEP), name))
        node.input[4] = name


def inferred(model: Any, *, strict: bool = False) -> Any:
    """``onnx.shape_inference.infer_shapes``, with the values of shapes propagated unless a Slice has a step that is
    too long or not a constant: ONNX adds it to a 32-bit index, and reads outside of the shape (onnx 1.23)."""
    safe = all(steps is not None and not _is_long(steps) for _, _, steps in _steps(model))
    return onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=safe)


def infer(model: Any, *, strict: bool = False) -> dict[str, TypeShape]:
    """Element type and (if static) shape of every tensor of the main graph that ONNX's shape inference can tell.

    ``strict``: raise onnx.shape_inference.InferenceError where the shapes contradict each other.
    """
    copy = skeleton(model)
    try:
        done = inferred(copy, strict=strict)
    except Exception:
        if strict:
            raise
        try:
            done = onnx.shape_inference.infer_shapes(copy)
        except Exception:  # inference is a help, not a condition: the importer decides
            done = copy
    found: dict[str, TypeShape] = {}
    for values in (done.graph.value_info, done.graph.input, done.graph.output):
        for value in values:
            if value.type.HasField("tensor_type"):
                known = found.get(value.name)
                if known is None or known[1] is None:
                    found[value.name] = (value.type.tensor_type.elem_type, static_shape(value))
    for tensor in model.graph.initializer:
        found[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    return found
