"""One spelling for what later phases match: constants second, padding in the convolution, one global average pool.
 Notes on the importer (TVM 0.27). AveragePool keeps ``count_include_pad`` and ``ceil_mode`` as attributes and turns
``auto_pad`` into four pads (top, left, bottom, right). MaxPool with SAME_LOWER rounds the output size down, which
ONNX does not. Convolutions with ``auto_pad`` SAME get a separate zero padding, ConvTranspose gets pads.
GlobalAveragePool is a ``mean`` over [2, 3] with keepdims, GlobalMaxPool a ``max``. Resize is ``image.resize2d`` in
NCHW. Constant Pad is a ``call_tir`` (lift_prim_calls.py turns it into ``nn.pad``); reflect and edge Pad stay
``call_tir``. Flatten is a reshape.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from ._utils import (
    BINARY,
    COMMUTATIVE,
    Graph,
    Rewriter,
    Rule,
    const,
    dtype_of,
    graph_pass,
    ints,
    is_const,
    like,
    number,
    op_name,
    shape_of,
    value,
    with_span,
)

NATIVE = "skim.native"  # attribute of the module: names of the convolutions that stand for native Winograd layers
_LOWEST = float(np.finfo("float32").min)
_NONNEGATIVE = ("nn.relu", "nn.relu6", "sigmoid", "exp", "abs", "square", "sqrt", "nn.softmax", "nn.softplus")
_KEEPS_SIGN = (
    "nn.max_pool2d",
    "nn.avg_pool2d",
    "reshape",
    "permute_dims",
    "mean",
    "max",
    "take",
    "strided_slice",
    "nn.dropout",
)


# -- elementwise -----------------------------------------------------------------------------------------------------
def _const_second(graph: Graph, var: Any, call: Any) -> Any:
    left, right = call.args
    return like(call, [right, left]) if is_const(left) and not is_const(right) else None


def _subtract(graph: Graph, var: Any, call: Any) -> Any:
    data, numbers = call.args
    if not is_const(numbers) or is_const(data) or "float" not in dtype_of(numbers):
        return None
    return relax.op.add(data, const(-value(numbers), dtype_of(numbers)))


def _divide(graph: Graph, var: Any, call: Any) -> Any:
    data, numbers = call.args
    if not is_const(numbers) or is_const(data) or "float" not in dtype_of(numbers):
        return None
    with np.errstate(all="ignore"):
        inverse = (1.0 / value(numbers).astype(np.float64)).astype(dtype_of(numbers))
    # A subnormal or infinite reciprocal would lose the quotient.
    usable = np.isfinite(inverse) & (np.abs(inverse) >= np.finfo(inverse.dtype).tiny)
    return relax.op.multiply(data, const(inverse)) if bool(np.all(usable)) else None


def _narrow(numbers: Any, target: tuple[int, ...]) -> Any:
    """A constant that was broadcast over pixels or rows (by ONNX Min, Max, Sum), without the repetitions. One number a
    channel stays one number a channel, also when all are equal."""
    shape = shape_of(numbers)
    channel = len(shape) - (len(target) - 1 if len(target) != 2 else 1)
    wide = [i for i, d in enumerate(shape) if d > 1 and i != channel]
    if not wide or math.prod(shape) > 1 << 16:
        return numbers
    array = value(numbers)
    if bool(np.all(array == array.flat[0])):
        return const(array.flat[0], dtype_of(numbers))
    for axis in wide:
        first = np.take(array, [0], axis)
        array = first if bool(np.all(array == first)) else array
    return numbers if array.shape == shape else const(array, dtype_of(numbers))


def _const_shape(graph: Graph, var: Any, call: Any) -> Any:
    """Scalars have shape (); constants of a 4-D tensor have four axes; a row for a matrix has one."""
    for at in (0, 1):
        numbers, data = call.args[at], call.args[1 - at]
        if not is_const(numbers) or is_const(data) or shape_of(data) != shape_of(var):
            continue
        numbers = _narrow(numbers, shape_of(data))
        shape, rank = shape_of(numbers), len(shape_of(data))
        wanted = shape
        if math.prod(shape) == 1:
            wanted = ()
        elif rank == 4 and len(shape) < 4:
            wanted = (1,) * (4 - len(shape)) + shape
        elif rank == 2 and len(shape) == 2 and shape[0] == 1:
            wanted = shape[1:]
        if wanted != shape_of(call.args[at]):
            moved = const(value(numbers).reshape(wanted), dtype_of(numbers))
            return like(call, [data, moved] if at else [moved, data])
    return None


# -- padding ---------------------------------------------------------------------------------------------------------
def _spatial_padding(graph: Graph, expr: Any) -> tuple[Any, list[int], float | None] | None:
    """(x, [top, left, bottom, right], fill) of a padding of the last two of four axes; None as the fill: edge pixels
    are repeated."""
    pad = graph.get(expr)
    if op_name(pad) != "nn.pad" or len(shape_of(expr)) != 4:
        return None
    mode = str(pad.attrs.pad_mode)
    if mode not in ("constant", "replicate"):
        return None
    width = ints(pad.attrs.pad_width)
    if any(width[:4]):
        return None
    return (
        pad.args[0],
        [width[4], width[6], width[5], width[7]],
        float(pad.attrs.pad_value) if mode == "constant" else None,
    )


def _four(padding: Any) -> list[int]:
    pads = ints(padding)
    return pads * 4 if len(pads) == 1 else pads * 2 if len(pads) == 2 else pads


def _pad_conv(graph: Graph, var: Any, call: Any) -> Any:
    found = _spatial_padding(graph, call.args[0])
    a = call.attrs
    if found is None or found[2] != 0 or str(a.data_layout) != "NCHW":
        return None
    x, pads, _ = found
    conv = relax.op.nn.conv2d(
        x,
        call.args[1],
        strides=ints(a.strides),
        padding=[p + q for p, q in zip(_four(a.padding), pads, strict=True)],
        dilation=ints(a.dilation),
        groups=int(a.groups),
        data_layout=str(a.data_layout),
        kernel_layout=str(a.kernel_layout),
        out_layout=str(a.out_layout),
        out_dtype=a.out_dtype,
    )
    return with_span(conv, call.span)


def _unread_taps(graph: Graph, var: Any, call: Any) -> Any:
    """Taps at the edges of a window that meet nothing but padding, wherever it lies, are cut off: 3x3 on an image of one
    pixel, dilation about the size of the image. The windows of native Winograd layers stay (``NATIVE``)."""
    a, (x, weight) = call.attrs, call.args
    if (str(a.data_layout), str(a.kernel_layout)) != ("NCHW", "OIHW") or not is_const(weight):
        return None
    native = graph.mod.attrs.get(NATIVE, ()) if graph.mod.attrs else ()
    if call.span is not None and call.span.source_name.name in [str(name) for name in native]:
        return None
    pads, strides, dilation, kept = _four(a.padding), _two(a.strides), _two(a.dilation), []
    for axis, (size, taps, out) in enumerate(
        zip(shape_of(x)[2:], shape_of(weight)[2:], shape_of(var)[2:], strict=True)
    ):
        first = [i * dilation[axis] - pads[axis] for i in range(taps)]  # what a tap of the first window reads
        met = [i for i, at in enumerate(first) if any(0 <= at + o * strides[axis] < size for o in range(out))] or [0]
        low, high = met[0] * dilation[axis], (taps - 1 - met[-1]) * dilation[axis]
        if low > pads[axis] or high > pads[axis + 2]:
            met, low, high = list(range(taps)), 0, 0  # part of the image would have to go, too
        pads[axis], pads[axis + 2] = pads[axis] - low, pads[axis + 2] - high
        dilation[axis] = dilation[axis] if len(met) > 1 else 1
        kept.append(slice(met[0], met[-1] + 1))
    small = value(weight)[:, :, kept[0], kept[1]]
    if small.shape == shape_of(weight):
        return None
    conv = relax.op.nn.conv2d(x, const(small), strides, pads, dilation, int(a.groups))
    return with_span(conv, call.span)


def is_nonnegative(graph: Graph, expr: Any, depth: int = 8) -> bool:
    """No element of the tensor can be below zero (as far as a short look at its producers tells)."""
    call = graph.get(expr)
    name = op_name(call)
    if name in _NONNEGATIVE or (name == "clip" and number(call.args[1]) >= 0):
        return True
    if depth == 0:
        return False
    if name == "concat":
        fields = graph.get(call.args[0])
        return isinstance(fields, relax.Tuple) and all(is_nonnegative(graph, f, depth - 1) for f in fields.fields)
    return name in _KEEPS_SIGN and is_nonnegative(graph, call.args[0], depth - 1)


def _pad_pool(graph: Graph, var: Any, call: Any) -> Any:
    """Padding of an unpadded pool. Below a max pool whose windows all hold a pixel: -inf, repeated edges, or zeros if
    no value is negative. Below an average pool: zeros, which count."""
    found = _spatial_padding(graph, call.args[0])
    a = call.attrs
    if found is None or str(a.layout) != "NCHW" or any(ints(a.padding)) or bool(a.ceil_mode):
        return None
    x, pads, fill = found
    is_max = op_name(call) == "nn.max_pool2d"
    reach = [(w - 1) * d + 1 for w, d in zip(ints(a.pool_size), _two(a.dilation), strict=True)]
    if is_max:
        fits = max(pads[0], pads[2]) < reach[0] and max(pads[1], pads[3]) < reach[1] and set(_two(a.dilation)) == {1}
        # A window that holds a repeated edge pixel also holds the pixel itself.
        if not fits or not (fill is None or fill <= _LOWEST or (fill == 0 and is_nonnegative(graph, x))):
            return None
    elif fill != 0:
        return None
    op = relax.op.nn.max_pool2d if is_max else relax.op.nn.avg_pool2d
    return op(
        x,
        pool_size=ints(a.pool_size),
        strides=ints(a.strides),
        padding=pads,
        dilation=ints(a.dilation),
        ceil_mode=False,
        count_include_pad=not is_max,
    )


def _two(values: Any) -> list[int]:
    pair = ints(values)
    return pair * 2 if len(pair) == 1 else pair


# -- global average pool ---------------------------------------------------------------------------------------------
def _adaptive_pool(graph: Graph, var: Any, call: Any) -> Any:
    if str(call.attrs.layout) != "NCHW" or shape_of(var)[2:] != (1, 1):
        return None
    return relax.op.mean(call.args[0], [2, 3], True)


def _window_is_input(graph: Graph, var: Any, call: Any) -> Any:
    """One window that holds every pixel; padding is allowed when it is not counted."""
    a, size = call.attrs, shape_of(call.args[0])[2:]
    if str(a.layout) != "NCHW" or shape_of(var)[2:] != (1, 1) or set(_two(a.dilation)) != {1}:
        return None
    pads, window = _four(a.padding), _two(a.pool_size)
    if any(pads) and bool(a.count_include_pad):
        return None
    whole = all(w - p >= s for w, p, s in zip(window, pads[:2], size, strict=True))
    counted = any(pads) or tuple(window) == size
    return relax.op.mean(call.args[0], [2, 3], True) if whole and counted else None


def _reduction_axes(graph: Graph, var: Any, call: Any) -> Any:
    axes, rank = ints(call.attrs.axis), len(shape_of(call.args[0]))
    wanted = sorted(a % rank for a in axes)
    if not axes or wanted == axes:
        return None
    return getattr(relax.op, op_name(call))(call.args[0], wanted, bool(call.attrs.keepdims))


def _reduction_shape(graph: Graph, var: Any, call: Any) -> Any:
    """reshape(mean(x)) that only adds or drops the reduced axes -> mean with the other ``keepdims``."""
    inner = graph.get(call.args[0])
    if op_name(inner) not in ("mean", "max", "sum", "min") or not graph.single_use(call.args[0]):
        return None
    source, axes = shape_of(inner.args[0]), ints(inner.attrs.axis)
    keepdims = not bool(inner.attrs.keepdims)
    kept = tuple(1 if i in axes else d for i, d in enumerate(source))
    if shape_of(var) != (kept if keepdims else tuple(d for i, d in enumerate(source) if i not in axes)) or not axes:
        return None
    return getattr(relax.op, op_name(inner))(inner.args[0], axes, keepdims)


def _take_mode(graph: Graph, var: Any, call: Any) -> Any:
    """The importer's ``fast`` mode makes TVM print a warning for every take; constant indices in range need no mode."""
    data, index = call.args
    if str(call.attrs.mode) == "clip" or call.attrs.axis is None or not is_const(index):
        return None
    axis = int(call.attrs.axis)
    size, numbers = shape_of(data)[axis], value(index)
    if numbers.size and not (int(numbers.min()) >= 0 and int(numbers.max()) < size):
        return None
    return relax.op.take(data, index, axis, "clip")


class _Canonicalize(Rewriter):
    """``rewrites`` counts the respelled calls."""

    def rules(self) -> dict[str, list[Rule]]:
        table: dict[str, list[Rule]] = {name: [_const_second] for name in COMMUTATIVE}
        table["subtract"] = [_subtract]
        table["divide"] = [_divide]
        for name in BINARY:
            table.setdefault(name, []).append(_const_shape)
        reductions: dict[str, list[Rule]] = {name: [_reduction_axes] for name in ("mean", "max", "min", "sum")}
        return {
            **table,
            **reductions,
            "nn.conv2d": [_pad_conv, _unread_taps],
            "nn.max_pool2d": [_pad_pool],
            "nn.avg_pool2d": [_pad_pool, _window_is_input],
            "nn.adaptive_avg_pool2d": [_adaptive_pool],
            "reshape": [_reduction_shape],
            "take": [_take_mode],
        }


Canonicalize = graph_pass("SkimCanonicalize")(_Canonicalize)
