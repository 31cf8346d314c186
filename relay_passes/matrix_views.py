"""Products of activations on matrices as they lie: in the planes of a convolution's result, transposed or not.

Between a layer and attention's products stand reshapes (channels into heads), transposes, slices (query, key and value of
one layer) and a factor. None of them needs to be computed: each operand, and the result where a layer reads it, is a
strided view of the value where it lies, and the factors become one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..layout import Layout
from ..schedules.matmul import Matrices, Product
from ._utils import Graph, dtype_of, is_const, op_name, scalar, shape_of, slice_bounds
from .simplify_noise import permutation
from .transpose_rules import groups_of_axes

_RENAMES = frozenset(("reshape", "permute_dims", "take", "strided_slice", "multiply"))  # that a view may stand for
Steps = tuple[int, int, int, int]  # how many images, channels, rows and elements of a row from one position to the next


@dataclass(frozen=True)
class View:
    """Some elements of the tensor ``root``: (extent, steps) of each axis, and the steps to the first. An ordinary tensor
    counts in elements; ``flat``: a value with a kernel, whose layout gives the steps their lengths."""

    root: Any
    flat: bool
    axes: tuple[tuple[int, Steps], ...]
    first: Steps = (0, 0, 0, 0)

    @staticmethod
    def of(root: Any, flat: bool) -> View:
        shape = shape_of(root)
        if flat:
            unit = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)
            return View(root, True, tuple(zip(shape, unit, strict=True)))
        pitches = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return View(root, False, tuple((d, (0, 0, 0, p)) for d, p in zip(shape, pitches, strict=True)))

    def permuted(self, axes: Sequence[int]) -> View:
        return replace(self, axes=tuple(self.axes[a] for a in axes))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """None where elements that are to be neighbours on one axis lie on several."""
        old, out = [d for d, _ in self.axes], []
        if 0 in old or not old or not shape:
            return None
        for left, right in groups_of_axes(old, shape):
            real = [self.axes[i] for i in left if old[i] != 1]
            for (_, outer), (inner, step) in itertools.pairwise(real):
                if outer != _times(step, inner):
                    return None
            step = real[-1][1] if real else (0, 0, 0, 0)
            new: list[tuple[int, Steps]] = []
            for i in reversed(right):
                new.insert(0, (shape[i], step))
                step = _times(step, shape[i])
            out += new
        return replace(self, axes=tuple(out)) if len(out) == len(shape) else None

    def apart(self, shape: Sequence[int], images: int) -> View | None:
        """Reshaped to ``shape``, the first axis of which is two here: the images, and what each has of it."""
        return None if shape[0] % images else self.reshaped((images, shape[0] // images, *shape[1:]))

    def sliced(self, axis: int, begin: int, extent: int) -> View:
        _, step = self.axes[axis]
        n, c, h, w = (a + begin * b for a, b in zip(self.first, step, strict=True))
        return replace(self, first=(n, c, h, w), axes=(*self.axes[:axis], (extent, step), *self.axes[axis + 1 :]))

    def without(self, axis: int) -> View:
        return replace(self, axes=(*self.axes[:axis], *self.axes[axis + 1 :]))

    def matrices(self, layout: Layout | None, size: int, channel: int = 0) -> Matrices:
        """In a buffer of ``size`` floats, which holds ``root`` in ``layout`` from ``channel`` on."""
        pitch = (0, 0, 0, 1) if layout is None else (layout.n_pitch, layout.c_pitch, layout.row_pitch, 1)
        front = 0 if layout is None else layout.front + channel * layout.c_pitch

        def length(steps: Steps) -> int:
            return sum(s * p for s, p in zip(steps, pitch, strict=True))

        *batch, row, column = (0 if d == 1 else length(s) for d, s in self.axes)
        return Matrices(size, row, column, tuple(batch), front + length(self.first))

    @property
    def contiguous(self) -> bool:
        """Rows of the matrices are runs of floats."""
        extent, step = self.axes[-1]
        return extent == 1 or step == (0, 0, 0, 1)


def _times(steps: Steps, count: int) -> Steps:
    n, c, h, w = steps
    return n * count, c * count, h * count, w * count


@dataclass(frozen=True)
class MatrixProduct:
    """result = scale * a @ b; ``result``: the view of the value that the product is computed into."""

    a: View
    b: View
    result: View
    scale: float

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple(d for d, _ in self.result.axes[:-2])

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.result.axes[-2][0], self.result.axes[-1][0], self.a.axes[-1][0]

    @property
    def size(self) -> int:
        """Elements of the result."""
        return math.prod(d for d, _ in self.result.axes)

    def work(self, a: Matrices, b: Matrices, c: Matrices) -> Product:
        return Product(*self.mnk, a, b, c, self.extents, self.scale)

    def __str__(self) -> str:
        m, n, k = self.mnk
        return f"{math.prod(self.extents)}x {m}x{k} * {k}x{n}"


def _operand(graph: Graph, var: Any, flat: set[Any]) -> tuple[View, float]:
    """``var`` as a view of the nearest value in ``flat``, or of itself, and the factor on it."""
    chain, scale, current = [], 1.0, var
    while current not in flat:
        call = graph.get(current)
        factor = scalar(call.args[1]) if op_name(call) == "multiply" else None
        if factor is not None and shape_of(call.args[0]) == shape_of(current):
            scale *= factor
        elif op_name(call) in _RENAMES - {"multiply"}:
            chain.append(current)
        else:
            return View.of(var, False), 1.0
        current = call.args[0]
        if graph.is_param(current) or is_const(current):
            return View.of(var, False), 1.0
    view: View | None = View.of(current, True)
    for step in reversed(chain):
        if view is None:
            break
        call, shape, rank = graph.get(step), shape_of(step), len(shape_of(graph.get(step).args[0]))
        same = _step(view, call, shape) if len(view.axes) == rank else None
        view = _step_apart(view, call, shape, shape_of(current)[0], len(view.axes) > rank) if same is None else same
    return (View.of(var, False), 1.0) if view is None else (view, scale)


def _step_apart(view: View, call: Any, shape: tuple[int, ...], images: int, already: bool) -> View | None:
    """As ``_step``, for a first axis that joins images and their heads, which lie on no common axis."""
    if op_name(call) == "reshape":
        return view.apart(shape, images)
    if op_name(call) == "permute_dims" and already and permutation(call)[0] == 0:
        return view.permuted([0, *(a + 1 for a in permutation(call))])
    return None


def _step(view: View, call: Any, shape: tuple[int, ...]) -> View | None:
    """The view behind a reshape, transpose, take or slice."""
    name = op_name(call)
    if name == "reshape":
        return view.reshaped(shape)
    if name == "permute_dims":
        return view.permuted(permutation(call))
    if name == "take":
        index = scalar(call.args[1])
        if index is None or shape_of(call.args[1]) or call.attrs.axis is None:
            return None
        axis = int(call.attrs.axis) % len(view.axes)
        extent = view.axes[axis][0]
        if not -extent <= index < extent:
            return None
        return view.sliced(axis, int(index) % extent, 1).without(axis)
    cuts = slice_bounds(call)
    if cuts is None:
        return None
    for axis, begin, end, step in cuts:
        low, high, by = slice(begin, end, step).indices(view.axes[axis][0])
        if by != 1 or high <= low:
            return None
        view = view.sliced(axis, low, high - low)
    return view


def read_product(graph: Graph, var: Any, flat: set[Any]) -> MatrixProduct | None:
    """The product ``var``, a matmul of activations or the reshape of one into channels, when it reads or is a value of
    ``flat``, the values with kernels; else None."""
    call, shape = graph.get(var), shape_of(var)
    result = View.of(var, False)
    if op_name(call) == "reshape":
        inner = call.args[0]
        if len(shape) != 4 or not graph.single_use(inner) or graph.op(inner) != "matmul":
            return None
        whole = View.of(var, True)
        seen = whole.reshaped(shape_of(inner)) or whole.apart(shape_of(inner), shape[0])
        if seen is None or not seen.contiguous:
            return None
        result, var, call, shape = seen, inner, graph.get(inner), shape_of(inner)
    if op_name(call) != "matmul" or len(shape) < 3 or dtype_of(var) != "float32":
        return None
    if any(is_const(a) or dtype_of(a) != "float32" or shape_of(a)[:-2] != shape[:-2] for a in call.args):
        return None
    if 0 in shape or 0 in shape_of(call.args[0]):
        return None
    (a, left), (b, right) = (_operand(graph, x, flat) for x in call.args)
    if not b.contiguous:
        b, right = View.of(call.args[1], False), 1.0
    if not (a.flat or b.flat or result.flat):
        return None
    views = a, b, result
    if any(len(v.axes) > len(shape) for v in views):
        images = {v.axes[0][0] for v in views if len(v.axes) > len(shape)}
        split = [_split_images(v, len(shape), images) for v in views]
        if len(images) > 1 or any(v is None for v in split):
            return None
        a, b, result = split  # type: ignore[assignment]
    return MatrixProduct(a, b, result, left * right)


def _split_images(view: View, rank: int, images: set[int]) -> View | None:
    if len(view.axes) > rank:
        return view
    return view.apart([d for d, _ in view.axes], next(iter(images)))


def is_factor(graph: Graph, var: Any) -> bool:
    """A multiplication by one number that nothing but products of activations read: theirs to do."""
    call = graph.get(var)
    if op_name(call) != "multiply" or scalar(call.args[1]) is None or graph.is_result(var):
        return False
    pending = [var]
    while pending:
        for user in graph.users[pending.pop()]:
            name = op_name(graph.get(user))
            if name in _RENAMES and name != "multiply" and not graph.is_result(user):
                pending.append(user)
            elif name != "matmul" or any(is_const(a) for a in graph.get(user).args):
                return False
    return True


def is_rename(graph: Graph, var: Any) -> bool:
    """Whether a view may stand for the operator of ``var``."""
    return op_name(graph.get(var)) in _RENAMES and not graph.is_result(var)
