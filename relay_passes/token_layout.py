"""Run transformers with channels outermost, the layout of the convolutions, where that moves less data.

Every dense layer on tokens f32[N, T, C] becomes a 1x1 convolution on f32[N, C, 1, T] between two transposes, and the
rules of ``to_nchw`` move the transposes until they meet. What is in the way is attention: with scores S = Q K' of
f32[N, heads, T, T] everything but its input and its result would stay in token order. S' = K Q' costs the same, its
softmax runs down the columns (no sums over the lanes of a vector), and V' S'' comes out with channels outermost.

The change is kept if it moves fewer elements than dense layers in token order do, which turn their input and their
result. A transposed first operand of a product of activations counts as nothing: that kernel reads it as it lies.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from ..kernels import FEW_ROWS
from ._utils import BINARY, UNARY, Graph, Rewriter, Rule, dtype_of, graph_pass, is_const, like, op_name, shape_of
from .dense_forms import SINKS
from .simplify_noise import SimplifyNoise, permutation
from .to_nchw import ToNCHW
from .transpose_rules import as_convolution, before_merge, groups_of_axes, inverse, swaps_last, transposed

_TO_NCHW = [0, 3, 1, 2]


def _shape(var: Any) -> tuple[int, ...]:
    """() for tuples."""
    return shape_of(var) if isinstance(var.ty, relax.TensorType) else ()


def _order(graph: Graph, var: Any) -> list[int] | None:
    """Axes of the input of the dense layer ``var``, batch and channels first; None for what is no dense layer on tokens."""
    call = graph.get(var)
    if op_name(call) != "matmul" or not is_const(call.args[1]) or is_const(call.args[0]):
        return None
    if any(dtype_of(a) != "float32" for a in call.args):
        return None
    shape = shape_of(call.args[0])
    if len(shape_of(call.args[1])) != 2 or len(shape) not in (2, 3, 4) or math.prod(shape[:-1]) < FEW_ROWS:
        return None
    if len(shape) == 2:  # rows are the tokens of one image, or the images
        params = [p for p in graph.func.params if shape_of(p)]
        return [1, 0] if all(shape_of(p)[0] == 1 for p in params) else None
    if len(shape) == 4:
        return _TO_NCHW
    return [1, 2, 0] if shape[1] == 1 or _tokens_first(graph, call.args[0]) else [0, 2, 1]


def _tokens_first(graph: Graph, var: Any) -> bool:
    """Whether f32[T, N, C] comes from a transpose that put the tokens in front of the images."""
    while True:
        call = graph.get(var)
        name = op_name(call)
        if name == "permute_dims":
            batches = {shape_of(p)[0] for p in graph.func.params if shape_of(p)}
            forth = shape_of(var)[0] not in batches  # and not back
            return len(permutation(call)) > 2 and permutation(call)[1] == 0 and forth
        if name == "matmul" and not is_const(call.args[1]):
            return False
        if name not in UNARY | BINARY | {"matmul", "reshape", "nn.layer_norm", "nn.rms_norm"}:
            return False
        before = next((a for a in call.args if not is_const(a)), None)
        if before is None or len(_shape(before)) < 2 or _shape(before)[0] != shape_of(var)[0]:
            return False
        var = before


def _moved(graph: Graph) -> int:
    """Elements that transposes, and dense layers in token order, move."""
    total = 0
    for var in graph.order():
        call = graph.get(var)
        if op_name(call) == "permute_dims" and not _free(graph, var, call):
            total += math.prod(shape_of(var))
        elif _order(graph, var):
            total += math.prod(shape_of(var)) + math.prod(shape_of(call.args[0]))
    return total


def _free(graph: Graph, var: Any, call: Any) -> bool:
    """Read by products of activations alone, as their first operand."""
    readers = [graph.get(u) for u in graph.users[var]]
    return (
        swaps_last(permutation(call))
        and not graph.is_result(var)
        and all(op_name(r) == "matmul" and r.args[0] == var and r.args[1] != var for r in readers)
    )


def _turned(graph: Graph, var: Any, order: list[int]) -> Any:
    """The dense layer as a convolution between transposes."""
    call = graph.get(var)
    turned = graph.emit(relax.op.permute_dims(call.args[0], order))
    if len(order) > 2:
        return relax.op.permute_dims(as_convolution(turned, call.args[1], call.span), inverse(order))
    image = graph.emit(relax.op.reshape(turned, (1, *shape_of(turned))))
    conv = as_convolution(image, call.args[1], call.span)
    return relax.op.permute_dims(relax.op.reshape(conv, shape_of(var)[::-1]), order)


def _with_axes(graph: Graph, var: Any, call: Any) -> Any:
    """A dense layer on rows that were tokens before a reshape: the reshape of the rows goes behind it."""
    inner: Any = graph.get(call.args[0]) if op_name(call) == "matmul" and is_const(call.args[1]) else None
    if op_name(inner) != "reshape" or len(shape_of(var)) != 2 or 0 in shape_of(inner.args[0]):
        return None
    shape, (count, width) = shape_of(inner.args[0]), shape_of(call.args[0])
    groups = groups_of_axes(shape, (count, width))
    if len(groups) == 2 and len(groups[0][0]) in (2, 3):
        tokens = (*(shape[i] for i in groups[0][0]), width)
    elif len(shape) in (3, 4) and count % shape[0] == 0 and count != shape[0]:  # an axis of images and heads
        tokens = (shape[0], count // shape[0], width)
    else:
        return None
    rows = relax.op.reshape(inner.args[0], tokens) if tokens != shape else inner.args[0]
    return relax.op.reshape(like(call, [rows, call.args[1]]), shape_of(var))


def _feeds_product(graph: Graph, var: Any) -> bool:
    """The scores reach, through elementwise operators and softmax, a product whose second operand is transposed."""
    while graph.single_use(var):
        reader = next(iter(graph.users[var]))
        call = graph.get(reader)
        if op_name(call) == "matmul":
            known = transposed(graph, call.args[1])
            return call.args[0] == var and known is not None and swaps_last(known[1])
        same = op_name(call) == "reshape" and shape_of(var)[-2:] == shape_of(reader)[-2:]
        if not same and op_name(call) not in UNARY | BINARY | {"nn.softmax"}:
            return False
        var = reader
    return False


class _TokenAxes(Rewriter):
    """Rows get their axes back as far as elementwise operators reach."""

    def rules(self) -> dict[str, list[Rule]]:
        return {"matmul": [_with_axes], **{name: [rule] for name, rule in SINKS.items()}}


class _TokenLayout(Rewriter):
    """``rewrites`` counts the dense layers, sums and products that were turned."""

    def run(self, graph: Graph) -> None:
        if not any(_order(graph, v) or _with_axes(graph, v, graph.get(v)) is not None for v in graph.order()):
            return
        state = graph.snapshot()
        _TokenAxes().run(graph)
        before = _moved(graph)
        for var in graph.order():
            joined = before_merge(graph, var, _TO_NCHW) if len(_shape(var)) == 4 else None
            if joined is not None:  # windows become an image again
                graph.replace(var, relax.op.permute_dims(joined, inverse(_TO_NCHW)))
        layers = [(v, order) for v in graph.order() if (order := _order(graph, v))]
        for var, order in layers:
            graph.replace(var, _turned(graph, var, order))
        self._settle(graph)
        others = self._turn_sums(graph) + self._turn_products(graph)
        if _moved(graph) < before:
            self.rewrites += len(layers) + others
        else:
            graph.restore(state)

    def _turn_sums(self, graph: Graph) -> int:
        """Sums of a transposed value and one in token order, as tokens of the network's input are: turned once, all
        residual sums behind it have channels outermost."""
        before, state, count = _moved(graph), graph.snapshot(), 0
        for var in graph.order():
            call, shape = graph.get(var), _shape(var)
            if op_name(call) not in BINARY or len(shape) < 3:
                continue
            if any(is_const(a) or _shape(a) != shape for a in call.args):
                continue
            known = [transposed(graph, a) for a in call.args]
            axes = next((k[1] for k in known if k is not None), None)
            if axes is None or None not in known:
                continue
            back = inverse(axes)
            args = [
                relax.op.permute_dims(a, back) if k is None else k[0] for a, k in zip(call.args, known, strict=True)
            ]
            graph.replace(var, relax.op.permute_dims(like(call, args), axes))
            count += 1
        return self._kept(graph, state, before, count)

    def _turn_products(self, graph: Graph) -> int:
        """S = A B as the transpose of B' A', where A is transposed and V behind the softmax is, too."""
        before, state, count = _moved(graph), graph.snapshot(), 0
        for var in graph.order():
            call = graph.get(var)
            left = transposed(graph, call.args[0]) if op_name(call) == "matmul" else None
            if left is None or not swaps_last(left[1]) or is_const(call.args[1]) or not _feeds_product(graph, var):
                continue
            axes = left[1]
            if len(shape_of(call.args[1])) == len(axes):
                turned = relax.op.matmul(relax.op.permute_dims(call.args[1], axes), left[0])
                graph.replace(var, relax.op.permute_dims(turned, axes))
                count += 1
        return self._kept(graph, state, before, count)

    def _kept(self, graph: Graph, state: Any, before: int, count: int) -> int:
        """``count`` changes, or none and the graph as it was if they move more than ``before``."""
        if count:
            self._settle(graph)
        if _moved(graph) <= before:
            return count
        graph.restore(state)
        return 0

    @staticmethod
    def _settle(graph: Graph) -> None:
        """Let transposes and reshapes meet."""
        stages = [SimplifyNoise.rewriter(), ToNCHW.rewriter()]
        for _ in range(Rewriter.max_rounds):
            before = sum(s.rewrites for s in stages)
            for stage in stages:
                stage.run(graph)
            if sum(s.rewrites for s in stages) == before:
                return


TokenLayout = graph_pass("SkimTokenLayout")(_TokenLayout)
