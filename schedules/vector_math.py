"""Branch-free float32 elementary functions as TIR expressions, for scalars and for vectors alike.

TVM lowers ``exp``, ``tanh``, ``erf``, ``log`` and ``pow`` to calls of the C library, which no compiler vectorises. The
functions here build plain arithmetic instead: range reduction, a polynomial, selects for the special values. ``x`` may
be a float32 scalar (LLVM vectorises the loop around it) or a ``float32xN`` expression made of ``Ramp`` loads; the
result has the type of ``x``. The coefficients are minimax fits (weighted Chebyshev least squares in float64).

Accuracy against float64, in units of the last place: exp 1, log 1, tanh 2, sigmoid 3, erf 3, power 4. Overflow gives
inf, underflow denormals and then 0, NaN stays NaN. Expressions rely on IEEE order of evaluation: no fast-math flags.

Selects are written so that a NaN in ``x`` takes the branch that still contains ``x``. Values that are needed twice are
bound by ``Let``; TVM does not share equal subexpressions by itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

Expr = Any  # tvm.ir.PrimExpr; the FFI classes carry no static types

EXP = (0.5000000096270335, 0.1666651770936612, 0.04166620231262384, 0.008369025054989621, 0.001395072390685799)
LOG = (0.33333310441219605, -0.24999986600168533, 0.2000222654091714, -0.1666925076078886, 0.14218659308177997,
       -0.12384349930180427, 0.11872969661945591, -0.11789797612799155, 0.06915370086329205)  # fmt: skip
TANH = (-0.3333326287982461, 0.13330899709178268, -0.05369296452058924, 0.020483306528734004, -0.0055286245992091235)
ERF = (1.1283791659137532, -0.37612627135966376, 0.11283600176264377, -0.026854444592248967, 0.005189535340079611,
       -0.0008020841287063611, 7.889119558561467e-05)  # fmt: skip
LOG_ERFC = (0.00018803817699453163, -1.129578415723938, -0.6332199080516521, -0.1084185630338817,
            0.025208248691421145, -0.004204559208604003, 0.0004413358960098253, -2.1686813459057613e-05)  # fmt: skip
LOG2_F64 = (2.8853900817779277, 0.9617966939215342, 0.5770780176623459, 0.4121983997232067, 0.320614021049559,
            0.261568367422735, 0.24109142566381103)  # fmt: skip
EXP2_F64 = (1.000000000000029, 0.6931471805459305, 0.2402265069546711, 0.05550410941217579, 0.009618129228620804,
            0.0013333450557808835, 0.00015403411541100602, 1.5310081925942817e-05, 1.3264089468895101e-06)  # fmt: skip

_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of a float32
_ROUND_BITS = struct.unpack("<i", struct.pack("<f", _ROUND))[0]


def lanes_of(x: Expr) -> int:
    """Vector length of an expression (1 for a scalar)."""
    return int(x.ty.dtype.lanes)


def _const(value: float, x: Expr, dtype: str = "float32") -> Expr:
    """``value`` as a constant with as many lanes as ``x``."""
    scalar, lanes = tirx.const(value, dtype), lanes_of(x)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _typed(dtype: str, x: Expr) -> str:
    lanes = lanes_of(x)
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret(_typed("int32", x), x)


def _from_bits(x: Expr) -> Expr:
    return tirx.reinterpret(_typed("float32", x), x)


def _power_of_two(n: Expr) -> Expr:
    """2**n of an int32 in [-126, 127]."""
    return _from_bits((n + _const(127, n, "int32")) << _const(23, n, "int32"))


def _scaled_by(x: Expr, n: Expr) -> Expr:
    """x * 2**n of float32x16 with integral ``n``, rounded once: one instruction of AVX-512."""
    keep, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")  # every lane; the current rounding mode
    return tirx.call_llvm_intrin("float32x16", "llvm.x86.avx512.mask.scalef.ps.512", x, n, x, keep, rounding)


def horner(x: Expr, coefficients: Sequence[float], dtype: str = "float32") -> Expr:
    """Polynomial with ascending ``coefficients``; multiply-adds contract to FMA."""
    result = _const(coefficients[-1], x, dtype)
    for c in reversed(coefficients[:-1]):
        result = result * x + _const(c, x, dtype)
    return result


def _abs(x: Expr) -> Expr:
    return _from_bits(_bits(x) & _const(0x7FFFFFFF, x, "int32"))


def _with_sign(magnitude: Expr, x: Expr) -> Expr:
    """A non-negative ``magnitude`` with the sign of ``x``."""
    return _from_bits(_bits(magnitude) | (_bits(x) & _const(-0x80000000, x, "int32")))


def exp(x: Expr) -> Expr:
    """e**x."""
    return _let(x, _exp)


def _exp(x: Expr) -> Expr:
    low, high = _const(-104.0, x), _const(89.0, x)  # beyond these the result is exactly 0 or inf
    clamped = tirx.Select(x < low, low, tirx.Select(x > high, high, x))

    def reduced(v: Expr) -> Expr:
        shifted = v * _const(math.log2(math.e), v) + _const(_ROUND, v)
        return _let(_bits(shifted) - _const(_ROUND_BITS, v, "int32"), lambda n: scaled(v, n))

    def scaled(v: Expr, n: Expr) -> Expr:
        nf = tirx.Cast(_typed("float32", v), n)
        # ln 2 in two pieces: the first has 12 significant bits, so its product with n is exact
        r = v - nf * _const(0.693359375, v) - nf * _const(math.log(2) - 0.693359375, v)
        one = _const(1, n, "int32")

        def value(f: Expr) -> Expr:
            poly = _const(1.0, f) + (f + f * f * horner(f, EXP))
            if lanes_of(v) == 16:
                return _scaled_by(poly, nf)
            # two factors, because 2**n itself may be denormal or too large
            return _let(n >> one, lambda half: poly * _power_of_two(half) * _power_of_two(n - half))

        return _let(r, value)

    return _let(clamped, reduced)


def log(x: Expr) -> Expr:
    """Natural logarithm; -inf at 0, NaN below 0."""
    return _let(x, _log)


def _log(x: Expr) -> Expr:
    small = x < _const(2.0**-126, x)  # denormals: scale up first
    scaled = tirx.Select(small, x * _const(2.0**23, x), x)
    bias = tirx.Select(small, _const(23.0, x), _const(0.0, x))
    # mantissa in [sqrt(1/2), sqrt(2)): take away the exponent of sqrt(1/2) before splitting
    root_half = 0x3F3504F3

    def split(offset: Expr) -> Expr:
        exponent = offset >> _const(23, x, "int32")
        mantissa = _from_bits((offset & _const(0x7FFFFF, x, "int32")) + _const(root_half, x, "int32"))
        e = tirx.Cast(_typed("float32", x), exponent) - bias
        return _let(e, lambda ev: _let(mantissa - _const(1.0, x), lambda f: value(ev, f)))

    def value(e: Expr, f: Expr) -> Expr:
        tail = f * f * f * horner(f, LOG) + e * _const(math.log(2) - 0.693359375, x)
        result = f + (tail - f * f * _const(0.5, x)) + e * _const(0.693359375, x)
        inf, nan = _const(math.inf, x), _const(math.nan, x)
        result = tirx.Select(x < inf, result, x)  # inf and NaN stay
        result = tirx.Select(x < _const(0.0, x), nan, result)
        return tirx.Select(x == _const(0.0, x), _const(-math.inf, x), result)

    return _let(_bits(scaled) - _const(root_half, x, "int32"), split)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x)."""
    one = _const(1.0, x)
    return one / (one + exp(_const(0.0, x) - x))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""

    def both(v: Expr, a: Expr) -> Expr:
        one, two = _const(1.0, v), _const(2.0, v)
        large = _with_sign(one - two / (exp(a + a) + one), v)
        small = _let(v * v, lambda u: v + v * (u * horner(u, TANH)))
        return tirx.Select(a > _const(0.625, v), large, small)

    return _let(x, lambda v: _piecewise(v, *TANH_PIECES) if lanes_of(x) == 16 else _let(_abs(v), lambda a: both(v, a)))


def erf(x: Expr) -> Expr:
    """Error function."""

    def both(v: Expr, a: Expr) -> Expr:
        top = _const(4.0, v)  # erf is 1 in float32 from here on
        large = _with_sign(_const(1.0, v) - exp(_let(tirx.Select(a > top, top, a), lambda t: horner(t, LOG_ERFC))), v)
        small = v * _let(v * v, lambda u: horner(u, ERF))
        return tirx.Select(a > _const(1.0, v), large, small)

    return _let(x, lambda v: _piecewise(v, *ERF_PIECES) if lanes_of(x) == 16 else _let(_abs(v), lambda a: both(v, a)))


def _pieces(f: Callable[[float], float], top: float, degree: int) -> tuple[float, float, tuple[tuple[float, ...], ...]]:
    """An odd f that rises to 1 at ``top``, as x * p[k](x - k * step) where k is x / step rounded: (step, end of the last
    piece, coefficients of ascending powers, 16 each). Interpolates f(x) / x at Chebyshev nodes."""
    step = float(np.float32(top / 15.4))
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1)
    rows = []
    for k in range(16):
        low, high = max(0.0, (k - 0.5) * step), (k + 0.5) * step
        x = (low + high) / 2 + (high - low) / 2 * nodes
        rows.append(np.polyfit(x - k * step, [f(v) / v for v in x], degree)[::-1])
    rows[-1] *= 1 + 2.0**-24  # so that no rounding keeps it below 1 at its end
    return step, top, tuple(tuple(float(c) for c in column) for column in np.array(rows).T)


# Where 16 lanes look up 16 coefficients in one instruction, a polynomial for each sixteenth of the range takes a third of
# the instructions that one formula for all of it needs (an exponential, a division and two polynomials).
ERF_PIECES = _pieces(math.erf, 3.925, 5)
TANH_PIECES = _pieces(math.tanh, 9.02, 6)


def _piecewise(x: Expr, step: float, top: float, table: tuple[tuple[float, ...], ...]) -> Expr:
    """What ``_pieces`` fitted, of a float32x16."""
    end, one = _const(top, x), _const(1.0, x)

    def of(a: Expr, shifted: Expr) -> Expr:
        k = _bits(shifted)  # of which the look-up takes the lowest four bits

        def coefficient(values: tuple[float, ...]) -> Expr:
            scalars = [tirx.const(v, "float32") for v in values]
            constant = tirx.Shuffle(scalars, list(range(16)))
            return tirx.call_llvm_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", constant, k)

        def value(t: Expr) -> Expr:
            result = coefficient(table[-1])
            for values in reversed(table[:-1]):
                result = result * t + coefficient(values)
            return a * result

        magnitude = _let(a - (shifted - _const(_ROUND, x)) * _const(step, x), value)
        return _let(magnitude, lambda r: _with_sign(tirx.Select(r > one, one, r), x))

    def bounded(a: Expr) -> Expr:
        return _let(a * _const(1 / step, x) + _const(_ROUND, x), lambda shifted: of(a, shifted))

    return _let(_abs(x), lambda a: _let(tirx.Select(a > end, end, a), bounded))


def sqrt(x: Expr) -> Expr:
    """Square root (one instruction)."""
    return tirx.sqrt(x)


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x) of a float32x16 of positive normal numbers, to 2 units in the last place: AVX-512's estimate of 14 bits
    and a step of Newton's method, in place of a square root and a division."""

    def refined(v: Expr, r: Expr) -> Expr:
        return r * (_const(1.5, v) - _const(0.5, v) * v * r * r)

    return _let(x, lambda v: _let(rsqrt14(v), lambda r: refined(v, r)))


def rsqrt14(x: Expr) -> Expr:
    """1 / sqrt(x) of a float32x16 of positive normal numbers, with a relative error of at most 2**-14."""
    return tirx.call_llvm_intrin("float32x16", "llvm.x86.avx512.rsqrt14.ps.512", x, x, tirx.const(-1, "int16"))


def power(x: Expr, y: Expr | float) -> Expr:
    """x**y with the special values of C's ``pow``.

    A constant ``y`` that is a multiple of 1/4 from -4 to 8 becomes multiplications and square roots (x**-0.75 is the
    exponent of local response normalisation); everything else is computed in float64.
    """
    exponent = _constant_value(y)
    if exponent is None:
        assert not isinstance(y, (int, float))
        return _let(x, lambda v: _let(y, lambda w: _pow(v, w)))
    if exponent == 0.0:
        return _const(1.0, x)
    if -4 <= exponent <= 8 and exponent * 4 == int(exponent * 4):
        return _let(x, lambda v: _power_by_roots(v, exponent))
    return _let(x, lambda v: _pow(v, _const(exponent, v)))


def _constant_value(y: Expr | float) -> float | None:
    if isinstance(y, (int, float)):
        return float(y)
    if isinstance(y, tirx.Broadcast):
        y = y.value
    return float(y.value) if isinstance(y, (tirx.FloatImm, tirx.IntImm)) else None


def _power_by_roots(x: Expr, exponent: float) -> Expr:
    if exponent <= -1:  # invert first: the power of 1 / x underflows gradually where 1 / power would be 1 / inf
        return _let(_const(1.0, x) / x, lambda inverse: _power_by_roots(inverse, -exponent))
    quarters = int(abs(exponent) * 4)
    whole, rest = divmod(quarters, 4)
    factors: list[Expr] = []
    if rest:
        root = _abs(tirx.sqrt(x))  # pow(-0, 0.5) is +0; pow(-inf, 0.5) is inf in C but NaN here
        factors.append(_let(root, {1: tirx.sqrt, 2: lambda r: r, 3: lambda r: r * tirx.sqrt(r)}[rest]))
    if whole:
        factors.append(_integer_power(x, whole))
    result = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    return result if exponent > 0 else _const(1.0, x) / result


def _integer_power(x: Expr, n: int) -> Expr:
    if n == 1:
        return x
    half = _let(_integer_power(x, n // 2), lambda h: h * h)
    return half * x if n % 2 else half


def _pow(x: Expr, y: Expr) -> Expr:
    f64, i64 = _typed("float64", x), _typed("int64", x)

    def const(value: float) -> Expr:
        return _const(value, x, "float64")

    def int64(value: int) -> Expr:
        return _const(value, x, "int64")

    def log2(a: Expr) -> Expr:  # a: float64, made from a positive float32, hence never denormal
        root_half = 0x3FE6A09E667F3BCD

        def split(offset: Expr) -> Expr:
            e = tirx.Cast(f64, offset >> int64(52))
            m = tirx.reinterpret(f64, (offset & int64(0xFFFFFFFFFFFFF)) + int64(root_half))
            s = _let(m, lambda v: (v - const(1.0)) / (v + const(1.0)))
            return e + _let(s, lambda v: v * _let(v * v, lambda z: horner(z, LOG2_F64, "float64")))

        value = _let(tirx.reinterpret(_typed("int64", x), a) - int64(root_half), split)
        value = tirx.Select(a < const(math.inf), value, a)
        return tirx.Select(a == const(0.0), const(-math.inf), value)

    def exp2(t: Expr) -> Expr:
        low, high = const(-300.0), const(300.0)  # far outside of float32, well inside of float64
        rounding = 1.5 * 2.0**52
        bits = struct.unpack("<q", struct.pack("<d", rounding))[0]

        def scaled(v: Expr, n: Expr) -> Expr:
            scale = tirx.reinterpret(f64, (n + int64(1023)) << int64(52))
            return _let(v - tirx.Cast(f64, n), lambda f: horner(f, EXP2_F64, "float64")) * scale

        clamped = tirx.Select(t < low, low, tirx.Select(t > high, high, t))
        return _let(
            clamped,
            lambda v: _let(tirx.reinterpret(i64, v + const(rounding)) - int64(bits), lambda n: scaled(v, n)),
        )

    def signed(magnitude: Expr) -> Expr:
        # odd integers keep the sign of x; a negative base with another exponent is NaN. Floats from 2**24 on are even.
        zero, one = _const(0.0, x), _const(1.0, x)
        whole = tirx.floor(y) == y
        halved = y * _const(0.5, x)
        odd = tirx.Select(whole, tirx.Select(tirx.floor(halved) == halved, zero, one), zero) > zero
        result = tirx.Select(odd, _with_sign(magnitude, x), magnitude)
        strict = tirx.Select(x < zero, one, zero) * tirx.Select(whole, zero, one)
        strict = strict * tirx.Select(x > _const(-math.inf, x), one, zero)  # -inf has a magnitude for every exponent
        result = tirx.Select(strict > zero, _const(math.nan, x), result)
        unit = tirx.Select(x == one, one, tirx.Select(y == zero, one, zero))
        minus = tirx.Select(x == _const(-1.0, x), one, zero)
        infinite = tirx.Select(_abs(y) == _const(math.inf, x), one, zero)
        return tirx.Select(unit + minus * infinite > zero, one, result)

    product = tirx.Cast(f64, y) * _let(tirx.Cast(f64, _abs(x)), log2)
    return _let(tirx.Cast(_typed("float32", x), exp2(product)), signed)
