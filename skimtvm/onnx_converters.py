"""ONNX operators that TVM's importer converts wrongly, converted to Relax here: consulted before TVM's own table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, te, tirx

# Arguments: block builder, inputs (None where left out), attributes, TVM's own conversion of other inputs.
Converter = Callable[[Any, list[Any], dict[str, Any], Callable[[list[Any]], Any]], Any]


def _dims(value: Any) -> list[int]:
    return [int(d) for d in value.ty.shape.values]


def _dtype(value: Any) -> str:
    dtype = value.ty.dtype
    return str(dtype.dtype if hasattr(dtype, "dtype") else dtype)


def _bit_shift(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """A shift by less than zero or by the width of the type or more empties the value, as if done bit by bit; machine
    shifts take the amount modulo the width."""
    x, y = (bb.normalize(i) for i in inputs)
    dtype, left = _dtype(x), attrs.get("direction", b"LEFT") == b"LEFT"
    info = np.iinfo(dtype)
    # Of a signed value a right shift leaves the sign: a shift by width - 1, for which no where() is needed.
    low, high = relax.const(0, dtype), relax.const(info.bits - 1, dtype)
    fits = relax.op.logical_and(relax.op.greater_equal(y, low), relax.op.less_equal(y, high))
    amount = relax.op.where(fits, y, high)
    shifted = relax.op.left_shift(x, amount) if left else relax.op.right_shift(x, amount)
    if not left and info.min < 0:
        return shifted
    return relax.op.where(fits, shifted, low)


def _dropout(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """At inference: the input, and a mask that keeps every element."""
    x = bb.normalize(inputs[0])
    return relax.Tuple([x, relax.const(np.ones(_dims(x), np.bool_))])


def _is_inf(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    x = bb.normalize(inputs[0])
    up, down = attrs.get("detect_positive", 1), attrs.get("detect_negative", 1)
    if up and down:
        return relax.op.isinf(x)
    if not up and not down:
        return relax.const(np.zeros(_dims(x), np.bool_))
    bound = relax.const(np.inf if up else -np.inf, _dtype(x))
    return relax.op.equal(x, bound)


def _mod(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """The remainder with the sign of the dividend (fmod=1) or divisor. Floats go through C's fmod, which is exact: TVM's
    x - trunc(x / y) * y is not, and gives NaN for an infinite divisor."""
    x, y = (bb.normalize(i) for i in inputs)
    c_sign = bool(attrs.get("fmod", 0))
    if not _dtype(x).startswith("float"):
        return relax.op.mod(x, y) if c_sign else relax.op.floor_mod(x, y)
    shape = np.broadcast_shapes(tuple(_dims(x)), tuple(_dims(y)))
    x, y = (bb.emit(relax.op.broadcast_to(v, shape)) if tuple(_dims(v)) != shape else v for v in (x, y))

    def remainder(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        def at(*i: Any) -> Any:
            rest = tirx.call_pure_extern(a.dtype, "fmodf" if a.dtype == "float32" else "fmod", a(*i), b(*i))
            if c_sign:
                return rest
            zero = tirx.const(0, a.dtype)
            differs = tirx.Select(b(*i) < zero, tirx.Select(rest > zero, 1, 0), tirx.Select(rest < zero, 1, 0)) > 0
            # A remainder of zero takes the sign of the divisor.
            unsigned = tirx.Select(rest == zero, tirx.copysign(zero, b(*i)), rest)
            return tirx.Select(differs, rest + b(*i), unsigned)

        return te.compute(a.shape, at, name="remainder")

    return bb.emit_te(remainder, x, y, primfunc_name_hint="remainder")


def _pow(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """Powers of integers, which TVM leaves to its code generator to refuse: float64 is exact up to 32 bits."""
    x, y = (bb.normalize(i) for i in inputs)
    dtype = _dtype(x)
    if dtype.startswith("float") and _dtype(y) == dtype:
        return tvm_own(inputs)
    if dtype in ("int64", "uint64"):
        raise NotImplementedError(f"powers of {dtype} are not supported; use int32 or float32")
    if dtype.startswith("float"):
        return relax.op.power(x, relax.op.astype(y, dtype))
    power = relax.op.power(relax.op.astype(x, "float64"), relax.op.astype(y, "float64"))
    return relax.op.astype(power, dtype)


def _reduce_bool(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    x = bb.normalize(inputs[0])
    if _dtype(x) != "bool":
        return tvm_own(inputs)
    return relax.op.astype(tvm_own([bb.emit(relax.op.astype(x, "int32")), *inputs[1:]]), "bool")


def _rms_normalization(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """Written out where the scale has several axes, which TVM's lowering of its operator misses."""
    x, scale = bb.normalize(inputs[0]), inputs[1]
    rank = len(_dims(x))
    axes = list(range(int(attrs.get("axis", -1)) % rank, rank))
    if len(axes) == len(_dims(scale)) == 1:
        return tvm_own(inputs)
    square = relax.op.mean(relax.op.multiply(x, x), axes, keepdims=True)
    norm = relax.op.sqrt(relax.op.add(square, relax.const(attrs.get("epsilon", 1e-5), _dtype(x))))
    return relax.op.multiply(relax.op.divide(x, norm), scale)


def _top_k(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """TVM's sort knows four types; the values of the others are sorted in a wider one."""
    x = bb.normalize(inputs[0])
    dtype = _dtype(x)
    if dtype in ("float32", "int32", "int64"):
        return tvm_own(inputs)
    if dtype == "uint64":
        raise NotImplementedError("TopK of uint64 is not supported; use int64 or float32")
    found = bb.normalize(tvm_own([bb.emit(relax.op.astype(x, "int64")), *inputs[1:]]))
    values, indices = (bb.emit(relax.TupleGetItem(found, k)) for k in (0, 1))
    return relax.Tuple([relax.op.astype(values, dtype), indices])


def _lp_normalization(bb: Any, inputs: list[Any], attrs: dict[str, Any], tvm_own: Any) -> Any:
    """x over its norm along an axis; 0 where the norm is 0."""
    x, axis = bb.normalize(inputs[0]), int(attrs.get("axis", -1))
    if int(attrs.get("p", 2)) == 1:
        norm = relax.op.sum(relax.op.abs(x), axis, keepdims=True)
    else:
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(x, x), axis, keepdims=True))
    norm = bb.emit(norm)
    zero, one = relax.const(0, _dtype(x)), relax.const(1, _dtype(x))
    return relax.op.divide(x, relax.op.where(relax.op.equal(norm, zero), one, norm))


CONVERTERS: dict[str, Converter] = {
    "BitShift": _bit_shift,
    "Dropout": _dropout,
    "IsInf": _is_inf,
    "LpNormalization": _lp_normalization,
    "Mod": _mod,
    "Pow": _pow,
    "RMSNormalization": _rms_normalization,
    "ReduceMax": _reduce_bool,
    "ReduceMin": _reduce_bool,
    "TopK": _top_k,
}
