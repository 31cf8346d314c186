"""Winograd's minimal filtering: the transform matrices, and the ONNX function that carries Winograd-domain weights.

F(m x m, r x r) computes m x m outputs of a stride 1 convolution with an r x r filter from a t x t input tile,
t = m + r - 1:   Y = A^T [U * (B^T d B)] A   with   U = G w G^T   (Lavin & Gray 2016, arXiv 1509.09308).
NumPy only; onnx is imported where an ONNX message is made.

In float32 the transforms magnify rounding: they add numbers larger than the result. Largest difference from float64 over
the largest output, ordinary weights of 64 to 512 channels, rectified inputs, in units of 2^-23: direct 1 to 3, F(2x2,3x3)
1 to 6, F(4x4,3x3) 10 to 60, F(4x4,4x4) 20 to 100, F(4x4,5x5) 20 to 200. ``expected_error`` estimates it for the weights
at hand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedWorkload
from .workload import ConvWorkload

DOMAIN = "ai.skimtvm"
FUNCTION_VERSION = 1  # of the domain: of what the functions mean
MIN_OPSET, MIN_IR = 13, 8
SIZES = ((4, 3), (2, 3), (4, 5), (4, 4))  # the (m, r) that layers can have; 4x4 filters: a strided 7x7 in phases
# Small points keep the transforms well conditioned; the point at infinity completes them.
_POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2), Fraction(1, 2), Fraction(-1, 2))

_SAMPLE_CHANNELS, _SAMPLE_TILES = 16, 16  # of expected_error

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Transform:
    """The matrices of F(m x m, r x r) in float64: ``at`` is A^T [m, t], ``bt`` B^T [t, t], ``g`` G [t, r]."""

    m: int
    r: int
    at: Array
    bt: Array
    g: Array

    @property
    def tile(self) -> int:
        return self.m + self.r - 1

    @property
    def name(self) -> str:
        """Name of the ONNX function."""
        return f"WinogradConv2d_F{self.m}x{self.m}_{self.r}x{self.r}"

    @functools.cached_property
    def filter_matrix(self) -> Array:
        """G (x) G: f64[t * t, r * r], vec(U) = filter_matrix @ vec(w)."""
        return np.asarray(np.kron(self.g, self.g), np.float64)

    @functools.cached_property
    def filter_inverse(self) -> Array:
        """Pseudo-inverse of filter_matrix: f64[r * r, t * t]."""
        return np.asarray(np.linalg.pinv(self.filter_matrix), np.float64)

    @functools.cached_property
    def input_matrix(self) -> Array:
        """B^T (x) B^T: f64[t * t, t * t], vec(V) = input_matrix @ vec(d)."""
        return np.asarray(np.kron(self.bt, self.bt), np.float64)

    @functools.cached_property
    def output_matrix(self) -> Array:
        """A^T (x) A^T: f64[m * m, t * t], vec(Y) = output_matrix @ vec(M)."""
        return np.asarray(np.kron(self.at, self.at), np.float64)

    @functools.cached_property
    def output_norms(self) -> Array:
        """f64[t, t]: L2 norm of what a unit at each position of the tile adds to the output, ||row_j(A (x) A)||."""
        return self._norms(self.output_matrix, 0)

    @functools.cached_property
    def effect(self) -> Array:
        """f64[t, t]: how much the outputs of a tile change for a unit change of each Winograd-domain weight, for inputs
        of independent pixels with unit variance: ||row_j(B^T (x) B^T)|| times output_norms."""
        return self.output_norms * self._norms(self.input_matrix, 1)

    @functools.cached_property
    def filter_norms(self) -> Array:
        """f64[t, t]: ||row_j(G (x) G)||, the scale of each Winograd-domain weight of a filter with unit weights."""
        return self._norms(self.filter_matrix, 1)

    @functools.cached_property
    def inverse_norms(self) -> Array:
        """f64[t, t]: ||pinv(G (x) G)[:, j]||, how much each Winograd-domain weight moves the spatial filter."""
        return self._norms(self.filter_inverse, 0)

    def _norms(self, matrix: Array, axis: int) -> Array:
        return np.asarray(np.linalg.norm(matrix, axis=axis), np.float64).reshape(self.tile, self.tile)

    def forward(self, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """G w G^T: [..., r, r] -> [..., t, t], in the dtype of ``weight``."""
        if weight.shape[-2:] != (self.r, self.r):
            raise UnsupportedWorkload(f"{self.name}: filters are {weight.shape[-2:]}, not {self.r}x{self.r}")
        return np.asarray(self.g @ weight.astype(np.float64) @ self.g.T, dtype=weight.dtype)

    def project(self, winograd: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The spatial filters [..., r, r] whose transforms are nearest to [..., t, t] (least squares)."""
        if winograd.shape[-2:] != (self.tile, self.tile):
            raise UnsupportedWorkload(f"{self.name}: weights are {winograd.shape[-2:]}, not {self.tile}x{self.tile}")
        flat = winograd.reshape(*winograd.shape[:-2], self.tile**2).astype(np.float64)
        return np.asarray(flat @ self.filter_inverse.T, dtype=winograd.dtype).reshape(*flat.shape[:-1], self.r, self.r)


@functools.cache
def transform(m: int, r: int) -> Transform:
    """F(m x m, r x r) by Cook and Toom. Raises UnsupportedWorkload for sizes that are not in SIZES."""
    if (m, r) not in SIZES:
        known = ", ".join(f"F({a}x{a},{b}x{b})" for a, b in SIZES)
        raise UnsupportedWorkload(f"winograd: F({m}x{m},{r}x{r}) is not offered; choose one of {known}")
    points = _POINTS[: m + r - 2]
    t = m + r - 1
    at, g, bt = np.zeros((m, t)), np.zeros((t, r)), np.zeros((t, t))
    for i, a in enumerate(points):
        others = [b for b in points if b != a]
        factor = functools.reduce(lambda p, b, a=a: p * (a - b), others, Fraction(1))  # type: ignore[misc]
        sign = -1 if i == 0 and factor < 0 else 1
        at[:, i] = [float(a**k) for k in range(m)]
        g[i] = [float(sign * a**k / factor) for k in range(r)]
        bt[i, : t - 1] = [float(sign * c) for c in _polynomial(others)]
    at[m - 1, t - 1] = g[t - 1, r - 1] = 1
    # With the sign that makes G positive for F(2x2,3x3); both matrices of the pair would flip together.
    bt[t - 1] = [float(c) for c in _polynomial(points)]
    for matrix in (at, g, bt):
        matrix.setflags(write=False)
    return Transform(m, r, at, bt, g)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of prod(x - root), lowest power first."""
    p = [Fraction(1)]
    for root in roots:
        p = [(p[k - 1] if k else Fraction(0)) - root * (p[k] if k < len(p) else 0) for k in range(len(p) + 1)]
    return p


def phase_filters(workload: ConvWorkload, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Filters of ``workload.phase_view`` that do what ``weight`` [k, c / groups, kh, kw] does: the tap that reads row i of
    phase plane p of channel c becomes tap i of channel c * phases + p. The same array for stride 1."""
    view = workload.phase_view
    if view is workload:
        return weight
    (sy, sx), (dy, dx), (top, left, _, _) = workload.strides, workload.dilation, workload.padding
    rows = [r * dy - top for r in range(workload.kh)]
    cols = [s * dx - left for s in range(workload.kw)]
    phases = list(itertools.product(sorted({r % sy for r in rows}), sorted({c % sx for c in cols})))
    out = np.zeros((*weight.shape[:2], len(phases), view.kh, view.kw), weight.dtype)
    for (i, row), (j, col) in itertools.product(enumerate(rows), enumerate(cols)):
        plane = phases.index((row % sy, col % sx))
        out[:, :, plane, row // sy + view.padding[0], col // sx + view.padding[1]] = weight[:, :, i, j]
    return out.reshape(view.weight_shape)


def of_tile(tile: int, r: int) -> Transform:
    """The transform of weights [K, C, tile, tile] of r x r filters. Raises UnsupportedWorkload."""
    return transform(tile + 1 - r, r)


def expected_error(weight: npt.NDArray[np.float32], m: int, *, seed: int = 0) -> float:
    """Rounding error that F(m x m, r x r) in float32 adds to a convolution with ``weight`` f32[k, c, r, r], over the
    largest output.

    An estimate: twice the largest error against float64 in a sample of tiles and output channels, with inputs of three
    kinds (normal; the same rectified; all pixels of a channel nearly equal, where products cancel most). The bound that
    holds for every input, eps * c * r * r * (product of the row sums of |B^T|, |G|, |A^T|, squared), is about a thousand
    times larger. Weights that overflow float32 in the transform give infinity.
    """
    f = transform(m, weight.shape[-1])
    rng = np.random.default_rng(seed)
    k, c = weight.shape[:2]
    weight = weight[rng.permutation(k)[:_SAMPLE_CHANNELS]]
    normal = rng.standard_normal((_SAMPLE_TILES, c, f.tile, f.tile))
    flat = np.abs(rng.standard_normal((_SAMPLE_TILES, c, 1, 1))) * (1 + 0.01 * normal)
    worst = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        u = f.forward(weight)
        for x in (a.astype(np.float32) for a in (normal, np.maximum(normal, 0), flat)):
            windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (f.r, f.r), axis=(2, 3))
            exact = np.einsum("ncijrs,kcrs->nkij", windows, weight.astype(np.float64), optimize=True)
            bt, at = f.bt.astype(np.float32), f.at.astype(np.float32)
            v = (bt @ x) @ bt.T
            product = np.einsum("ncij,kcij->ijnk", v, u, optimize=True).transpose(2, 3, 0, 1)
            largest = float(np.abs(exact).max(initial=0.0))
            if largest:
                error = float(np.abs((at @ product) @ at.T - exact).max()) / largest
                worst = max(worst, error if np.isfinite(error) else np.inf)
    return 2 * worst


def function_names() -> dict[str, tuple[int, int]]:
    """ONNX function name -> (m, r)."""
    return {f"WinogradConv2d_F{m}x{m}_{r}x{r}": (m, r) for m, r in SIZES}


def function_proto(m: int, r: int, opset: int = 17) -> Any:
    """The model-local function of F(m x m, r x r), whose body is standard operators of ``opset`` (>= 13).

    Inputs: X f32[N, C, H, W], U f32[K, C, t, t] (position-wise weights, as ``Transform.forward`` makes them from
    filters of a Conv), B f32[K]. Attribute ``pads``: top, left, bottom, right. Output: f32[N, K, H + top + bottom
    - r + 1, W + left + right - r + 1], the convolution with stride 1. The model needs ir_version >= 8.
    """
    from onnx import AttributeProto, helper, numpy_helper

    if opset < MIN_OPSET:
        raise UnsupportedWorkload(
            f"winograd: the ONNX function needs opset {MIN_OPSET} or newer, the model has {opset}"
        )
    f = transform(m, r)
    t, tt = f.tile, f.tile**2
    nodes: list[Any] = []

    def emit(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(name: str, value: Any) -> str:
        array = np.asarray(value, np.int64 if np.asarray(value).dtype.kind == "i" else np.float32)
        return emit("Constant", [], name, value=numpy_helper.from_array(array, name))

    def piece(source: str, start: str, stop: str, output: str) -> str:
        return emit("Slice", [source, start, stop], output)

    pads = helper.make_node("Constant", [], ["pads_v"], name="pads_v")
    pads.attribute.append(AttributeProto(name="value_ints", type=AttributeProto.INTS, ref_attr_name="pads"))
    nodes.append(pads)
    zero, one, two, four = (constant(f"i{k}", [k]) for k in (0, 1, 2, 4))
    # Extents. Both axes at once: every name that ends in _hw is an int64[2].
    emit("Shape", ["X"], "x_shape")
    emit("Shape", ["U"], "u_shape")
    n, c = piece("x_shape", zero, one, "n"), piece("x_shape", one, two, "c")
    k = piece("u_shape", zero, one, "k")
    emit("Add", [piece("x_shape", two, four, "x_hw"), piece("pads_v", zero, two, "begin_hw")], "x_begin_hw")
    emit("Add", ["x_begin_hw", piece("pads_v", two, four, "end_hw")], "padded_hw")
    emit("Sub", ["padded_hw", constant("halo", [r - 1])], "out_hw")
    emit("Add", ["out_hw", constant("round", [m - 1])], "rounded_hw")
    emit("Div", ["rounded_hw", constant("m", [m])], "tiles_hw")
    emit("Mul", ["tiles_hw", "m"], "whole_hw")
    emit("Sub", ["whole_hw", "out_hw"], "extra_hw")
    emit("Add", ["end_hw", "extra_hw"], "end_all_hw")
    none = constant("none", [0, 0])
    emit("Concat", [none, "begin_hw", none, "end_all_hw"], "pads_all", axis=0)
    emit("Pad", ["X", "pads_all"], "x_padded", mode="constant")
    # V = B^T d B of every tile: a convolution of each channel alone with the t * t rows of B^T (x) B^T.
    emit("Add", ["whole_hw", "halo"], "whole_in_hw")
    rest = constant("rest", [-1])
    emit("Concat", [rest, one, "whole_in_hw"], "planes_shape", axis=0)
    emit("Reshape", ["x_padded", "planes_shape"], "planes")
    emit("Conv", ["planes", constant("bt", f.input_matrix.reshape(tt, 1, t, t))], "v", strides=[m, m])
    positions = constant("positions", [tt])
    emit("Concat", [n, c, positions, rest], "v_split", axis=0)
    emit("Reshape", ["v", "v_split"], "v_nct")
    emit("Transpose", ["v_nct"], "v_tcn", perm=[2, 1, 0, 3])
    emit("Concat", [positions, c, rest], "v_flat", axis=0)
    emit("Reshape", ["v_tcn", "v_flat"], "v_matrices")
    # One product [K, C] x [C, N * tiles] for each position.
    emit("Reshape", ["U", constant("u_flat", [0, 0, -1])], "u_kct")
    emit("Transpose", ["u_kct"], "u_matrices", perm=[2, 0, 1])
    emit("MatMul", ["u_matrices", "v_matrices"], "product")
    # Y = A^T M A: tiles do not overlap in the output, so a transposed convolution puts them side by side.
    emit("Concat", [positions, k, n, "tiles_hw"], "m_split", axis=0)
    emit("Reshape", ["product", "m_split"], "m_tkn")
    emit("Transpose", ["m_tkn"], "m_nkt", perm=[2, 1, 0, 3, 4])
    emit("Concat", [rest, positions, "tiles_hw"], "m_planes_shape", axis=0)
    emit("Reshape", ["m_nkt", "m_planes_shape"], "m_planes")
    at = constant("at", np.ascontiguousarray(f.output_matrix.T).reshape(tt, 1, m, m))
    emit("ConvTranspose", ["m_planes", at], "y_planes", strides=[m, m])
    emit("Concat", [n, k, "whole_hw"], "y_shape", axis=0)
    emit("Reshape", ["y_planes", "y_shape"], "y_whole")
    emit("Slice", ["y_whole", none, "out_hw", constant("hw_axes", [2, 3])], "y_cut")
    emit("Reshape", ["B", constant("bias_shape", [1, -1, 1, 1])], "bias")
    emit("Add", ["y_cut", "bias"], "Y")
    return helper.make_function(
        DOMAIN, f.name, ["X", "U", "B"], ["Y"], nodes, [helper.make_opsetid("", opset)], attributes=["pads"]
    )


def function_node(m: int, r: int, inputs: Sequence[str], output: str, pads: Sequence[int], name: str = "") -> Any:
    """A call of the function: ``inputs`` X, U, B; ``pads`` top, left, bottom, right."""
    from onnx import helper

    attributes = {"pads": [int(p) for p in pads]}
    return helper.make_node(transform(m, r).name, inputs, [output], name=name or None, domain=DOMAIN, **attributes)


def add_function(model: Any, m: int, r: int) -> None:
    """Give ``model`` the definition of F(m x m, r x r) if it lacks it, and import the domain."""
    from onnx import helper

    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=MIN_OPSET)
    model.ir_version = max(model.ir_version, MIN_IR)
    if not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, FUNCTION_VERSION))
    if not any(f.domain == DOMAIN and f.name == transform(m, r).name for f in model.functions):
        model.functions.append(function_proto(m, r, opset))
