"""What the folding passes know about the layers with weights: where the output channels are and how to scale them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._utils import Array, Graph, const, dtype_of, is_const, like, op_name, shape_of, value

ANCHORS = ("nn.conv2d", "nn.conv2d_transpose", "nn.conv1d", "matmul")


def is_anchor(graph: Graph, expr: Any) -> bool:
    """A conv2d, conv1d, conv2d_transpose or matmul with constant weights, in the layouts that the importer emits."""
    call = graph.get(expr)
    name = op_name(call)
    if (
        name not in ANCHORS
        or not is_const(call.args[1])
        or dtype_of(call.args[1]) not in ("float32", "float64", "float16")
    ):
        return False
    if name == "matmul":
        return len(shape_of(call.args[1])) == 2 and len(shape_of(call.args[0])) >= 2
    a = call.attrs
    layouts = (str(a.data_layout), str(a.kernel_layout))
    return str(a.out_layout) in ("", layouts[0]) and layouts in (("NCHW", "OIHW"), ("NCHW", "IOHW"), ("NCW", "OIW"))


def channel_axis(graph: Graph, expr: Any) -> int:
    """Output channel axis: the last one for matmul, 1 for convolutions."""
    return len(shape_of(expr)) - 1 if graph.op(expr) == "matmul" else 1


def per_channel(array: Array, shape: tuple[int, ...], axis: int) -> Array | None:
    """``array``, broadcast against a tensor of ``shape``, as one number per channel (float64); None if it varies
    elsewhere or would enlarge the tensor."""
    if array.ndim > len(shape):
        if any(d != 1 for d in array.shape[: array.ndim - len(shape)]):
            return None
        array = array.reshape(array.shape[array.ndim - len(shape) :])
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(d != 1 for i, d in enumerate(full.shape) if i != axis) or full.shape[axis] not in (1, shape[axis]):
        return None
    return np.broadcast_to(full.reshape(-1).astype(np.float64), (shape[axis],))


def channel_const(numbers: Array, rank: int, axis: int, dtype: str) -> Any:
    """Constant that adds to (multiplies) channel ``axis`` of a tensor of ``rank``: (1,C,1,1), or (K,) on a last
    axis."""
    if axis == rank - 1:
        return const(numbers, dtype)
    return const(numbers.reshape([-1 if i == axis else 1 for i in range(rank)]), dtype)


def scale_weights(call: Any, scale: Array) -> Any:
    """The weights of an anchor with its output channels multiplied by ``scale`` (K,), computed in float64.

    Zeros stay zeros: 0 * s is 0 for every finite s, and -0.0 is written as 0.0.
    """
    weight = value(call.args[1])
    name = op_name(call)
    if name == "matmul":
        scaled = weight * scale
    elif name == "nn.conv2d_transpose":  # IOHW: (C, K / groups, kh, kw)
        groups = int(call.attrs.groups)
        c, k, *window = weight.shape
        scaled = weight.reshape(groups, c // groups, k, *window) * scale.reshape(groups, 1, k, *[1] * len(window))
    else:
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return const(scaled.reshape(weight.shape) + 0.0, str(weight.dtype))


def scale_output(graph: Graph, expr: Any, scale: Array) -> Any:
    """The anchor call computing ``scale * expr`` (same span)."""
    call = graph.get(expr)
    return like(call, [call.args[0], scale_weights(call, scale), *call.args[2:]])
