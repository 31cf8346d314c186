"""Well-known networks with seeded random weights, pruned on request: for examples, tests and measurements.

The graphs are the ``light`` models that come with the onnx package; their files hold shapes instead of weights. The
weights made here keep the variance of activations about constant from the first layer to the last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .errors import EnvironmentProblem, InvalidOption
from .onnx_fold import add_initializer
from .onnx_infer import infer
from .onnx_shapes import change_batch, resolve_inputs, set_input_shapes

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
_TABLE_OF = {"alexnet": "caffenet"}
_LAYERS = ("Conv", "Gemm")
_LOGIT_STD = 2.0  # of the last layer: wide enough that softmax ranks the classes clearly


def seed_table(name: str) -> dict[str, float]:
    """Sparsity (0..1) of each pruned layer of a published model, by weight tensor of the ONNX graph.

    Raises InvalidOption for a network without a table.
    """
    tables = json.loads((Path(__file__).parent / "data" / "seed_sparsity.json").read_text())["networks"]
    key = _TABLE_OF.get(name, name)
    if key not in tables:
        raise InvalidOption(
            f"sparsity 'seed': network '{name}' has no table; choose one of {', '.join(sorted(tables))}"
        )
    return {_weight_of(key, layer): percent / 100 for layer, percent in tables[key]["layers"].items()}


def _weight_of(network: str, layer: str) -> str:
    if network != "resnet50":
        return f"{layer}_w_0"
    match = re.fullmatch(r"(res\d)([a-z])_(branch\w+)", layer)
    if match is None:  # fc1000
        return "gpu_0/pred_w_0"
    return f"gpu_0/{match[1]}_{ord(match[2]) - ord('a')}_{match[3]}_w_0"


def parse_pattern(pattern: str) -> int:
    """Rows R of a block pattern ``Rx1``: R output channels share each column that stays."""
    match = re.fullmatch(r"(\d+)x1", pattern)
    if match is None or not 1 <= int(match[1]) <= 64:
        raise InvalidOption(f"pattern '{pattern}' is unknown; give Rx1 with R from 1 to 64, e.g. 4x1")
    return int(match[1])


def prune(weight: np.ndarray, sparsity: float, *, rows: int = 1, groups: int = 1) -> np.ndarray:
    """Copy of ``weight`` (float32, output channels first) with the smallest magnitudes set to zero.

    ``rows`` > 1 prunes blocks of so many consecutive output channels of one group, by the L2 norm of the block; the
    last block of a group may have fewer. Exactly round(sparsity * number of blocks) blocks become zero.
    """
    if rows == 1:
        flat = weight.copy().reshape(-1)
        flat[_smallest(np.abs(flat), sparsity)] = 0
        return flat.reshape(weight.shape)
    out = weight.shape[0] // groups
    blocks = -(-out // rows)
    padded = np.zeros((groups, blocks * rows, weight[0].size), np.float32)
    padded[:, :out] = weight.reshape(groups, out, -1)
    view = padded.reshape(groups, blocks, rows, -1)
    drop = _smallest(np.sqrt((view * view).sum(axis=2)).reshape(-1), sparsity).reshape(groups, blocks, 1, -1)
    view *= ~drop
    return np.ascontiguousarray(padded[:, :out]).reshape(weight.shape)


def _smallest(magnitude: np.ndarray, sparsity: float) -> np.ndarray:
    """Mask of exactly round(sparsity * size) of the smallest entries; the first ones win ties."""
    count = round(sparsity * magnitude.size)
    if count == 0:
        return np.zeros(magnitude.shape, bool)
    limit = _kth_smallest(magnitude, count - 1)
    mask: np.ndarray = magnitude < limit
    ties = np.flatnonzero(magnitude == limit)[: count - int(np.count_nonzero(mask))]
    mask[ties] = True
    return mask


def _kth_smallest(values: np.ndarray, k: int) -> Any:
    """Entry k of the sorted ``values`` (1-D); a sample brackets it first, which is much faster than partition."""
    if values.size > 1 << 20:
        sample = np.sort(values[:: values.size >> 18])
        at = k * sample.size // values.size
        low, high = sample[max(at - 2000, 0)], sample[min(at + 2000, sample.size - 1)]
        below = int(np.count_nonzero(values < low))
        middle = values[(values >= low) & (values <= high)]
        if below <= k < below + middle.size:
            return np.partition(middle, k - below)[k - below]
    return np.partition(values, k)[k]


def _path(name: str) -> Path:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{NAMES[name]}.onnx"
    if not path.is_file():
        raise EnvironmentProblem(f"network '{name}': this onnx package lacks {path.name}; reinstall onnx from PyPI")
    return path


def _options(
    name: str, sparsity: float | str | None, batch: int, pattern: str | None
) -> tuple[float | dict[str, float], int]:
    if name not in NAMES:
        raise InvalidOption(f"network '{name}' is unknown; choose one of {', '.join(sorted(NAMES))}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InvalidOption(f"batch is {batch!r}; give a whole number of at least 1")
    rows = 1 if pattern is None else parse_pattern(pattern)
    if pattern is not None and sparsity is None:
        raise InvalidOption(f"pattern '{pattern}' needs a sparsity; give one from 0 to below 1")
    if sparsity == "seed":
        return seed_table(name), rows
    try:
        value = 0.0 if sparsity is None else float(sparsity)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < 1:
        raise InvalidOption(f"sparsity is {sparsity!r}; give a share of zeros from 0 to below 1, or 'seed'")
    return value, rows


def build(
    name: str,
    *,
    sparsity: float | str | None = None,
    seed: int = 0,
    batch: int = 1,
    keep_first: bool = False,
    pattern: str | None = None,
) -> Any:
    """The network ``name`` (see NAMES) as an onnx.ModelProto with float32 weights as initializers.

    ``sparsity``: share of zeros in every convolution and fully-connected weight, or "seed" for the published share of
    each layer. ``keep_first`` leaves the first layer dense, ``pattern`` ("4x1") prunes blocks. The same arguments give
    the same model. Layers are named after their weights. Raises InvalidOption for arguments that make no sense.
    """
    shares, rows = _options(name, sparsity, batch, pattern)
    model = onnx.load(str(_path(name)))
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


def weights(model: Any) -> dict[str, np.ndarray]:
    """Weight of every convolution and fully-connected layer of a built model, by layer name."""
    tensors = {t.name: t for t in model.graph.initializer}
    source = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Reshape" and n.input[0] in tensors}
    return {
        n.name: numpy_helper.to_array(tensors[source.get(n.input[1], n.input[1])])
        for n in model.graph.node
        if n.op_type in _LAYERS
    }
