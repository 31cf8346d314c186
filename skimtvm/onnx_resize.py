"""Resize operators that TVM computes differently from ONNX, rewritten in ONNX. Nothing here needs TVM.

TVM takes the ratio of the sizes for the scale, which it is only where a scale gives a whole number of pixels, and knows
neither ``antialias`` nor ``axes`` nor ``keep_aspect_ratio_policy``. Resizing is linear in the pixels and separable, so
what TVM lacks becomes one matrix product an axis, whose weights ONNX's reference implementation gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.helper
from onnx import numpy_helper

from .errors import UnsupportedModel
from .onnx_infer import TypeShape, infer
from .onnx_read import one_line, opset_of

_KEPT = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a", "exclude_outside", "antialias")


_VALUES = {
    "mode": (b"nearest", b"linear", b"cubic"),
    "coordinate_transformation_mode": (
        *(b"half_pixel", b"half_pixel_symmetric", b"pytorch_half_pixel", b"align_corners", b"asymmetric"),
        b"tf_crop_and_resize",
    ),
    "nearest_mode": (b"round_prefer_floor", b"round_prefer_ceil", b"floor", b"ceil"),
    "keep_aspect_ratio_policy": (b"stretch", b"not_larger", b"not_smaller"),
}


def plain_resizes(model: Any) -> bool:
    """Rewrite in place; True if something changed. Raises UnsupportedModel for a Resize that cannot be rewritten."""
    if opset_of(model) < 11 or not any(_is_resize(n) for n in model.graph.node):
        return False
    types, initial = infer(model), {t.name: t for t in model.graph.initializer}
    nodes: list[Any] = []
    for node in model.graph.node:
        nodes += _rewrite(model, node, types, initial) if _is_resize(node) else [node]
    if all(a is b for a, b in zip(nodes, model.graph.node, strict=False)) and len(nodes) == len(model.graph.node):
        return False
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return True


def _is_resize(node: Any) -> bool:
    return node.op_type == "Resize" and node.domain in ("", "ai.onnx")


def _refuse(node: Any, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"Resize node '{one_line(node.name or node.output[0], 80)}': {what} is not supported")


def _rewrite(model: Any, node: Any, types: Mapping[str, TypeShape], initial: Mapping[str, Any]) -> list[Any]:
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for name, known in _VALUES.items():
        if name in attrs and attrs[name] not in known:
            raise _refuse(node, f"{name}={one_line(attrs[name].decode(errors='replace'), 40)!r}")
    shape = types.get(node.input[0], (0, None))[1]
    given = [numpy_helper.to_array(initial[n]) if n in initial else None for n in node.input[2:4]]
    values = next((v for v in given if v is not None and v.size), None)
    if attrs.get("coordinate_transformation_mode") == b"tf_crop_and_resize" and "axes" in attrs:
        raise _refuse(node, "tf_crop_and_resize with axes")
    odd = [name for name in ("axes", "keep_aspect_ratio_policy", "antialias") if _is_set(attrs, name)]
    if shape is None or values is None or 0 in shape:
        if odd:
            raise _refuse(node, f"{odd[0]} with a scale or shape that is not constant")
        return [node]  # TVM's importer says what is missing
    axes = [a % len(shape) if shape else 0 for a in attrs.get("axes", range(len(shape)))]
    if len(set(axes)) != values.size or len(axes) != values.size or not np.isfinite(values).all():
        raise _refuse(node, f"a scale or shape of {values.size} values for {len(axes)} axes")
    by_size = not (given[0] is not None and given[0].size)
    scales, sizes = [1.0] * len(shape), list(shape)
    policy = attrs.get("keep_aspect_ratio_policy", b"stretch")
    common = {b"not_larger": min, b"not_smaller": max}.get(policy) if by_size else None
    ratios = [float(v) / shape[a] if by_size else float(v) for a, v in zip(axes, values, strict=True)]
    for axis, ratio, value in zip(axes, [common(ratios)] * len(axes) if common else ratios, values, strict=True):
        scales[axis] = ratio
        sizes[axis] = (
            round(ratio * shape[axis]) if common else int(value) if by_size else math.floor(ratio * shape[axis])
        )
    if min(sizes) < 1:
        raise _refuse(node, f"a result of shape {tuple(sizes)}")
    exact = all(math.isclose(s * d, o, rel_tol=1e-6) for s, d, o in zip(scales, shape, sizes, strict=True))
    if exact and not _is_set(attrs, "antialias"):
        if not odd:
            return [node]
        return [_with_sizes(model, node, sizes)]
    if attrs.get("coordinate_transformation_mode") == b"tf_crop_and_resize" or (common and not exact):
        raise _refuse(node, "a scale that does not give a whole number of pixels")
    return _products(model, node, shape, scales, sizes)


def _is_set(attrs: Mapping[str, Any], name: str) -> bool:
    return name in attrs and attrs[name] not in (0, b"stretch")


def _with_sizes(model: Any, node: Any, sizes: list[int]) -> Any:
    name = f"{node.output[0]}/sizes"
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    roi = node.input[1] if len(node.input) > 1 else ""
    plain = onnx.helper.make_node("Resize", [node.input[0], roi, "", name], list(node.output), name=node.name)
    dropped = ("axes", "keep_aspect_ratio_policy", "antialias")
    plain.attribute.extend(a for a in node.attribute if a.name not in dropped)
    return plain


def _products(model: Any, node: Any, shape: tuple[int, ...], scales: list[float], sizes: list[int]) -> list[Any]:
    rank = len(shape)
    changed = [a for a in range(rank) if sizes[a] != shape[a] or scales[a] != 1.0]
    if rank < 2 or any(a < rank - 2 for a in changed):
        raise _refuse(node, f"a scale of {scales[changed[0]]:g} along axis {changed[0]}")
    value, nodes = node.input[0], []
    for axis in changed:
        matrix = _weights(model, node, shape[axis], scales[axis])
        if matrix.shape != (shape[axis], sizes[axis]):
            raise _refuse(node, f"a scale of {scales[axis]:g} along axis {axis}")
        name = f"{node.output[0]}/axis{axis}"
        last = axis == rank - 1
        model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(matrix if last else matrix.T), name + "/weight")
        )
        inputs = [value, name + "/weight"] if last else [name + "/weight", value]
        value = node.output[0] if axis == changed[-1] else name
        nodes.append(onnx.helper.make_node("MatMul", inputs, [value], name=name))
    return nodes


def _weights(model: Any, node: Any, size: int, scale: float) -> np.ndarray:
    """f32[size, result]: row i is what a single bright pixel i of a line of ``size`` pixels becomes."""
    from onnx.reference import ReferenceEvaluator

    line = onnx.helper.make_node("Resize", ["x", "", "scales"], ["y"])
    line.attribute.extend(a for a in node.attribute if a.name in _KEPT)
    feeds = {"x": np.eye(size, dtype=np.float32), "scales": np.array([1.0, scale], np.float32)}
    try:
        result = ReferenceEvaluator(line, opsets={"": opset_of(model)}).run(None, feeds)[0]
    except Exception as err:  # it raises whatever NumPy does
        raise _refuse(node, f"this combination of attributes ({one_line(err, 80)})") from None
    return np.asarray(result, np.float32)
