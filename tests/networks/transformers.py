"""Transformers in the spellings of several exporters, node by node."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from .graphs import Net


class Tokens(Net):
    """A network on tokens ``x`` f32[N, T, C] (N may be a name, so that one file serves every batch size)."""

    def __init__(self, *shape: Any, heads: int = 4, density: float = 1.0, seed: int = 0) -> None:
        super().__init__(*shape, seed=seed)
        self.batch, self.tokens, self.width = shape[0], shape[1], shape[-1]
        self.heads, self.density = heads, density

    @property
    def depth(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    def input(self, name: str, *shape: Any) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.const(np.float32(value))

    def matrix(self, c: int, k: int) -> str:
        w = self.rng.standard_normal((c, k)) * (self.rng.random((c, k)) < self.density)
        return self.const((w / math.sqrt(max(1.0, c * self.density))).astype(np.float32))

    def vector(self, c: int, around: float = 0.0) -> str:
        return self.const((around + 0.1 * self.rng.standard_normal(c)).astype(np.float32))

    def dense(self, x: str, c: int, k: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.matrix(c, k)), self.vector(k))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def norm(self, x: str) -> str:
        return self.op("LayerNormalization", x, self.vector(self.width, 1), self.vector(self.width), axis=-1)

    def rms_norm(self, x: str) -> str:
        square = self.op("ReduceMean", self.op("Pow", x, self.number(2)), axes=[-1], keepdims=1)
        root = self.op("Sqrt", self.op("Add", square, self.number(1e-6)))
        return self.op("Mul", self.op("Div", x, root), self.vector(self.width, 1))

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.number(math.sqrt(2))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.number(1))), self.number(0.5))

    def mlp(self, x: str) -> str:
        hidden = self.gelu(self.dense(x, self.width, 2 * self.width))
        return self.dense(hidden, 2 * self.width, self.width)

    # ---- query, key and value: f32[N, heads, T, D], f32[N, heads, D, T], f32[N, heads, T, D] -------------------------

    def split_heads(self, x: str, *, key: bool = False, tokens: int = -1) -> str:
        rows = self.reshape(x, 0, tokens, self.heads, self.depth)
        return self.transpose(rows, *((0, 2, 3, 1) if key else (0, 2, 1, 3)))

    def separate(self, x: str, other: str | None = None) -> tuple[str, str, str]:
        """Three products, as Hugging Face writes them; ``other``: what keys and values are made of."""
        q, k, v = (self.dense(s, self.width, self.width) for s in (x, other or x, other or x))
        return self.split_heads(q), self.split_heads(k, key=True), self.split_heads(v)

    def split(self, x: str) -> tuple[str, str, str]:
        q, k, v = self.op("Split", self.dense(x, self.width, 3 * self.width), axis=-1, outputs=3)
        return self.split_heads(q), self.split_heads(k, key=True), self.split_heads(v)

    def gather(self, x: str) -> tuple[str, str, str]:
        """One packed product; query, key and value by index, as torchvision and timm write them."""
        packed = self.reshape(self.dense(x, self.width, 3 * self.width), 0, self.tokens, 3, self.heads, self.depth)
        packed = self.transpose(packed, 2, 0, 3, 1, 4)
        q, k, v = (self.op("Gather", packed, self.const(np.int64(i)), axis=0) for i in range(3))
        return q, self.transpose(k, 0, 1, 3, 2), v

    def rows(self, x: str) -> tuple[str, str, str]:
        """Gemm on the tokens as rows of a matrix."""
        flat = self.reshape(x, -1, self.width)
        q, k, v = (self.gemm(flat) for _ in range(3))
        q, k, v = (self.reshape(y, -1, self.tokens, self.heads, self.depth) for y in (q, k, v))
        return self.transpose(q, 0, 2, 1, 3), self.transpose(k, 0, 2, 3, 1), self.transpose(v, 0, 2, 1, 3)

    def gemm(self, x: str) -> str:
        return self.op("Gemm", x, self.matrix(self.width, self.width), self.vector(self.width), transB=1)

    def attend(self, q: str, k: str, v: str, mask: str | None = None) -> str:
        """f32[N, heads, T, D]."""
        scores = self.op("Div", self.op("MatMul", q, k), self.number(math.sqrt(self.depth)))
        scores = scores if mask is None else self.op("Add", scores, mask)
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), v)

    def merge_heads(self, x: str) -> str:
        return self.reshape(self.transpose(x, 0, 2, 1, 3), 0, -1, self.width)

    def attention(self, x: str, spelling: str = "separate", mask: str | None = None) -> str:
        """f32[N, T, C] with its last dense layer."""
        if spelling == "tokens_first":
            return self.transpose(self.tokens_first(self.transpose(x, 1, 0, 2)), 1, 0, 2)
        y = self.attend(*getattr(self, spelling)(x), mask=mask)
        if spelling == "rows":
            y = self.gemm(self.reshape(self.transpose(y, 0, 2, 1, 3), -1, self.width))
            return self.reshape(y, -1, self.tokens, self.width)
        return self.dense(self.merge_heads(y), self.width, self.width)

    def tokens_first(self, x: str) -> str:
        """torch's MultiheadAttention on f32[T, N, C]: the images' heads are one axis."""
        packed = self.reshape(self.dense(x, self.width, 3 * self.width), self.tokens, -1, 3, self.width)
        packed = self.transpose(self.op("Unsqueeze", packed, self.ints(0)), 3, 1, 2, 0, 4)
        packed = self.op("Squeeze", packed, self.ints(3))
        q, k, v = (self.op("Gather", packed, self.const(np.int64(i)), axis=0) for i in range(3))
        shape = self.tokens, -1, self.depth
        q, k, v = (self.transpose(self.reshape(y, *shape), 1, 0, 2) for y in (q, k, v))
        scores = self.op("MatMul", self.op("Mul", q, self.number(self.depth**-0.5)), self.transpose(k, 0, 2, 1))
        y = self.transpose(self.op("MatMul", self.op("Softmax", scores, axis=-1), v), 1, 0, 2)
        return self.reshape(self.gemm(self.reshape(y, -1, self.width)), self.tokens, -1, self.width)

    def block(self, x: str, spelling: str = "separate", mask: str | None = None) -> str:
        """Attention and dense layers, each behind a norm and with a residual sum."""
        x = self.op("Add", x, self.attention(self.norm(x), spelling, mask))
        return self.op("Add", x, self.mlp(self.norm(x)))


SPELLINGS = "separate", "split", "gather", "rows", "tokens_first"
