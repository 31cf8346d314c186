"""Convolution networks: the ``light`` models that come with the onnx package, whose files hold shapes instead of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..errors import EnvironmentProblem
from ..onnx_fold import add_initializer
from ..onnx_infer import infer
from ..onnx_shapes import change_batch, resolve_inputs, set_input_shapes
from .pruning import prune

NAMES = {
    "alexnet": "light_bvlc_alexnet",
    "caffenet": "light_bvlc_alexnet",
    "googlenet": "light_inception_v1",
    "inception_v2": "light_inception_v2",
    "resnet50": "light_resnet50",
    "squeezenet": "light_squeezenet",
    "shufflenet": "light_shufflenet",
    "densenet121": "light_densenet121",
    "vgg19": "light_vgg19",
    "zfnet512": "light_zfnet512",
}
_LAYERS = ("Conv", "Gemm")
_LOGIT_STD = 2.0  # of the last layer: wide enough that softmax ranks the classes clearly


def path(name: str) -> Path:
    """File of the graph of ``name``. Raises EnvironmentProblem."""
    file = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{NAMES[name]}.onnx"
    if not file.is_file():
        raise EnvironmentProblem(f"network '{name}': this onnx package lacks {file.name}; reinstall onnx from PyPI")
    return file


def build(
    name: str,
    shares: float | dict[str, float],
    *,
    rows: int = 1,
    keep_first: bool = False,
    seed: int = 0,
    batch: int = 1,
) -> Any:
    """The network ``name`` of NAMES as an onnx.ModelProto; ``shares``: of zeros in every weight, or by weight tensor."""
    model = onnx.load(str(path(name)))
    model.ir_version = max(4, model.ir_version)
    _Weights(model, np.random.default_rng(seed), shares, rows, keep_first).fill()
    if batch != 1:
        shapes, change = resolve_inputs(model, None, batch)
        assert change is not None
        change_batch(model, shapes, *change)
        set_input_shapes(model, shapes)
        known = infer(model)
        for value in model.graph.output:
            for d in known[value.name][1] or ():
                value.type.tensor_type.shape.dim.add().dim_value = d
    return model


class _Weights:
    """Fills in the weights in graph order, with an estimate of the mean square of every activation."""

    def __init__(
        self, model: Any, rng: np.random.Generator, shares: float | dict[str, float], rows: int, keep_first: bool
    ):
        self.model, self.graph, self.rng = model, model.graph, rng
        self.shares, self.rows, self.keep_first = shares, rows, keep_first
        self.types = infer(model)
        self.alias: dict[str, str] = {}  # output of Unsqueeze or Reshape of a weight -> weight
        self.square: dict[str, float] = {}
        self.relu: dict[str, float] = {}  # gain of a Relu on this value, where it is not that of a symmetric one
        self.made: dict[str, np.ndarray] = {}

    def fill(self) -> None:
        graph = self.graph
        constant = {n.output[0] for n in graph.node if n.op_type == "ConstantOfShape"}
        constant |= {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
        inputs = [v for v in graph.input if v.name not in {t.name for t in graph.initializer}]
        self.square.update((v.name, 1.0) for v in inputs)
        self.alias.update((name, name) for name in constant)
        nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
        layers = [n for n in nodes if n.op_type in _LAYERS]
        for node in nodes:
            if node.input[0] in self.alias and node.op_type in ("Unsqueeze", "Reshape"):
                self.alias[node.output[0]] = self.alias[node.input[0]]
                continue
            square = self._node(node, first=node is layers[0], last=node is layers[-1])
            self.square.update((o, square) for o in node.output)
            self._track_sign(node)
        kept = [n.SerializeToString() for n in nodes]
        del graph.node[:]
        graph.node.extend(onnx.NodeProto.FromString(n) for n in kept)
        used = {i for n in graph.node for i in n.input}
        others = [t for t in graph.initializer if t.name in used and t.name not in constant]
        small = [onnx.TensorProto.FromString(t.SerializeToString()) for t in others]
        del graph.initializer[:]
        graph.initializer.extend(small)
        for weight in list(self.made):
            add_initializer(graph, weight, self.made.pop(weight))
        keep = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in inputs if v.name in used]
        del graph.input[:]
        graph.input.extend(keep)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.types[name][1] or ()

    def _weights(self, node: Any) -> Iterator[tuple[int, str]]:
        return ((k, self.alias[i]) for k, i in enumerate(node.input) if i in self.alias)

    def _normal(self, name: str, mean: float, std: float) -> None:
        values = self.rng.standard_normal(self._shape(name), dtype=np.float32)
        self.made[name] = values * np.float32(std) + np.float32(mean)

    def _uniform(self, name: str, low: float, high: float) -> None:
        self.made[name] = (self.rng.random(self._shape(name), dtype=np.float32) * (high - low) + low).astype(np.float32)

    def _layer(self, node: Any, square: float, first: bool, last: bool) -> float:
        """Weights of a convolution or fully-connected layer: mean square of its output is that of the target."""
        target = _LOGIT_STD if last else 1.0
        weight = self.alias[node.input[1]]
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        shape = self._shape(weight)
        values = self.rng.standard_normal(shape, dtype=np.float32)
        share = self.shares.get(weight, 0.0) if isinstance(self.shares, dict) else self.shares
        if share and not (first and self.keep_first):
            # Fully-connected weights are stored output-first in all of these graphs (transB = 1).
            values = prune(values.reshape(shape[-2:]) if node.op_type == "Gemm" else values, share,
                           rows=self.rows, groups=attrs.get("group", 1)).reshape(shape)  # fmt: skip
        fan_in = shape[-1] if node.op_type == "Gemm" else math.prod(shape[1:])
        flat = values.reshape(-1)
        mean_square = float(np.dot(flat, flat)) / flat.size
        values *= np.float32(target / math.sqrt(max(mean_square, 1e-12) * fan_in * square))
        self.made[weight] = values
        for k, bias in self._weights(node):
            if k == 2:
                self._normal(bias, 0.0, 0.05)
        node.name = re.sub(r"^gpu_0/|_w_0$", "", weight)
        return target**2

    def _node(self, node: Any, *, first: bool, last: bool) -> float:
        """Make the weights of ``node``; returns the estimated mean square of its output."""
        op = node.op_type
        inputs = [i for i in node.input if i in self.square]
        square = self.square[inputs[0]]
        if op in _LAYERS:
            return self._layer(node, square, first, last)
        if op == "BatchNormalization":
            gamma, beta, mean, variance = (self.alias[i] for i in list(node.input)[1:5])
            self._uniform(gamma, 0.8, 1.2)
            self._normal(beta, 0.0, 0.1)
            self._normal(mean, 0.0, 0.1 * math.sqrt(square))
            self._uniform(variance, 0.8 * square, 1.25 * square)
            return 1.0
        if op in ("Mul", "Add") and len(inputs) == 1:  # per-channel scale and shift after a normalisation
            for _, weight in self._weights(node):
                if op == "Mul":
                    self._uniform(weight, 0.8, 1.2)
                else:
                    self._normal(weight, 0.0, 0.1)
            return square
        if op in ("Sum", "Add"):
            return sum(self.square[i] for i in inputs)
        if op == "Concat":
            channels = [self._shape(i)[1] for i in inputs]
            return sum(c * self.square[i] for c, i in zip(channels, inputs, strict=True)) / sum(channels)
        return square * (self.relu.get(inputs[0], 0.5) if op == "Relu" else _GAIN.get(op, 1.0))

    def _track_sign(self, node: Any) -> None:
        """A Relu halves the mean square of a symmetric value, leaves a positive one, takes little from their sum."""
        inputs = [i for i in node.input if i in self.square]
        positive = [i for i in inputs if self.relu.get(i) == 1.0]
        if node.op_type == "Relu" or (node.op_type in _KEEP_SIGN and len(positive) == len(inputs)):
            self.relu[node.output[0]] = 1.0
        elif node.op_type in ("Sum", "Add", "Concat") and positive:
            total = sum(self.square[i] for i in inputs)
            rest = total - sum(self.square[i] for i in positive)
            self.relu[node.output[0]] = 1 - (0.3 if node.op_type != "Concat" else 0.5) * rest / total


_KEEP_SIGN = (
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Sum",
    "Add",
    "LRN",
    "Dropout",
    "Reshape",
    "Transpose",
)
# Mean square of the output over that of the input, for activations of a random network.
_GAIN = {"MaxPool": 2.0, "AveragePool": 0.75, "GlobalAveragePool": 0.7}
