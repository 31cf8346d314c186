"""Transformer encoders in the spelling of PyTorch's exporter: a MatMul and an Add for each projection, attention as
Reshape, Transpose, MatMul, Div, Softmax, GELU as Div, Erf, Add, Mul, Mul."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..errors import InvalidOption
from ..onnx_fold import add_initializer
from .pruning import prune

OPSET, IR_VERSION = 17, 8  # the first with LayerNormalization
EPSILON = 1e-12  # of the layer normalisations, as in BERT

# Root mean square of what each part of a random encoder is given or gives. Attention scores this wide pick a few tokens
# each, as in trained networks; if they averaged all, or if the branches weighed as much as what they are added to, the
# tokens would become one and the same vector within a few layers.
_SCORE_STD = 3.0
_BRANCH_RMS = 0.3
_CONTEXT_SQUARE = 0.4  # mean square of attention's average of values of mean square 1
_GELU_SQUARE = 0.425  # E[gelu(z)^2] of a standard normal z


@dataclass(frozen=True)
class Encoder:
    """Layers of self-attention and feed-forward, each behind a residual sum and a layer normalisation (post-norm)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.feed_forward, self.tokens) < 1 or self.width % self.heads:
            raise InvalidOption(f"{self}: give whole numbers from 1, and a width that its heads divide")


TRANSFORMERS = {"bert": Encoder()}  # BERT-base without embeddings, pooler and mask


def build(
    encoder: Encoder, share: float, *, rows: int = 1, keep_first: bool = False, seed: int = 0, batch: int = 1
) -> Any:
    """``encoder`` as an onnx.ModelProto: "embeddings" f32[batch, tokens, width] to "output" of the same shape.

    ``share`` of every weight matrix is 0: blocks of ``rows`` neighbouring outputs that share an input, of least norm;
    ``keep_first`` leaves the first matrix, the query projection, dense. No shape in the graph holds the batch.
    """
    made = _Graph(np.random.default_rng(seed), share, rows, keep_first)
    x = "embeddings"
    for i in range(encoder.layers):
        x = _layer(made, encoder, f"encoder.layer.{i}", x, "output" if i == encoder.layers - 1 else "")
    shape = [batch, encoder.tokens, encoder.width]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("embeddings", x)]
    graph = made.graph
    graph.name = "encoder"
    graph.input.append(values[0])
    graph.output.append(values[1])
    opsets = [helper.make_opsetid("", OPSET)]
    model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="skimtvm.zoo", opset_import=opsets)
    model.graph.CopyFrom(graph)
    return model


def _layer(made: _Graph, encoder: Encoder, name: str, x: str, output: str) -> str:
    """Add one layer on ``x``; returns its result, called ``output`` if that is not empty."""
    size, width, wide = encoder.width // encoder.heads, encoder.width, encoder.feed_forward
    heads, whole = made.integers([0, 0, encoder.heads, size]), made.integers([0, 0, width])
    attention = f"{name}.attention"

    def split(part: str, target: float, *axes: int) -> str:
        projected = made.linear(f"{attention}.self.{part}", x, width, width, 1.0, target)
        parts = made.add("Reshape", f"{attention}.self.{part}.heads", projected, heads)
        return made.add("Transpose", f"{attention}.self.{part}.turned", parts, perm=axes)

    key_query = math.sqrt(_SCORE_STD)
    query = split("query", key_query, 0, 2, 1, 3)
    key = split("key", key_query, 0, 2, 3, 1)
    value = split("value", 1.0, 0, 2, 1, 3)
    scores = made.add("MatMul", f"{attention}.self.scores", query, key)
    scaled = made.add("Div", f"{attention}.self.scaled", scores, made.scalar(math.sqrt(size)))
    shares = made.add("Softmax", f"{attention}.self.shares", scaled, axis=-1)
    mixed = made.add("MatMul", f"{attention}.self.context", shares, value)
    turned = made.add("Transpose", f"{attention}.self.context.turned", mixed, perm=(0, 2, 1, 3))
    context = made.add("Reshape", f"{attention}.self.context.whole", turned, whole)
    dense = made.linear(f"{attention}.output.dense", context, width, width, _CONTEXT_SQUARE, _BRANCH_RMS)
    total = made.add("Add", f"{attention}.output.sum", dense, x)
    x = made.normalisation(f"{attention}.output.LayerNorm", total, width)

    inner = made.linear(f"{name}.intermediate.dense", x, width, wide, 1.0, 1.0)
    active = made.gelu(f"{name}.intermediate", inner)
    dense = made.linear(f"{name}.output.dense", active, wide, width, _GELU_SQUARE, _BRANCH_RMS)
    total = made.add("Add", f"{name}.output.sum", dense, x)
    return made.normalisation(f"{name}.output.LayerNorm", total, width, output)


class _Graph:
    """A graph that grows node by node, with its weights."""

    def __init__(self, rng: np.random.Generator, share: float, rows: int, keep_first: bool) -> None:
        self.graph = onnx.GraphProto()
        self.rng, self.share, self.rows = rng, share, rows
        self.dense = keep_first  # for the next weight only
        self.constants: set[str] = set()

    def add(self, op: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{name}_output_0"
        self.graph.node.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self.constants:
            self.constants.add(name)
            add_initializer(self.graph, name, array)
        return name

    def scalar(self, value: float) -> str:
        return self._constant(f"scalar_{value:g}", np.array(value, np.float32))

    def integers(self, values: list[int]) -> str:
        return self._constant("shape_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _normal(self, name: str, size: int, mean: float, std: float) -> str:
        values = self.rng.standard_normal(size, dtype=np.float32)
        return self._constant(name, values * np.float32(std) + np.float32(mean))

    def linear(self, name: str, x: str, inputs: int, outputs: int, square: float, target: float) -> str:
        """A projection of ``x``, of mean square ``square``, to root mean square ``target``."""
        values = self.rng.standard_normal((outputs, inputs), dtype=np.float32)
        if self.share and not self.dense:
            values = prune(values, self.share, rows=self.rows)
        self.dense = False
        flat = values.reshape(-1)
        mean_square = max(float(np.dot(flat, flat)) / flat.size, 1e-12)
        values *= np.float32(target / math.sqrt(mean_square * inputs * square))
        weight = self._constant(f"{name}.weight", values.T)
        bias = self._normal(f"{name}.bias", outputs, 0.0, 0.05)
        product = self.add("MatMul", name, x, weight)
        return self.add("Add", f"{name}.add", bias, product)

    def normalisation(self, name: str, x: str, width: int, output: str = "") -> str:
        gamma = self._normal(f"{name}.weight", width, 1.0, 0.1)
        beta = self._normal(f"{name}.bias", width, 0.0, 0.1)
        return self.add("LayerNormalization", name, x, gamma, beta, output=output, axis=-1, epsilon=EPSILON)

    def gelu(self, name: str, x: str) -> str:
        scaled = self.add("Div", f"{name}.gelu.div", x, self.scalar(math.sqrt(2)))
        erf = self.add("Erf", f"{name}.gelu.erf", scaled)
        above = self.add("Add", f"{name}.gelu.add", erf, self.scalar(1.0))
        product = self.add("Mul", f"{name}.gelu.mul", x, above)
        return self.add("Mul", f"{name}.gelu", product, self.scalar(0.5))
