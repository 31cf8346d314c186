"""The weights of an ONNX model as NumPy arrays, in and out. Imports onnx."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from ..errors import InvalidModel
from ..onnx_read import subgraphs
from ..onnx_recurrent import GATES
from ..winograd import DOMAIN, function_names, of_tile

Array = npt.NDArray[Any]
_VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")  # the same numbers in the same order
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)


def attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


class Graph:
    """Index of the main graph of ``model``: constants (initializers and Constant nodes), uses, producers."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.refresh()

    def refresh(self) -> None:
        self.constants: dict[str, Any] = {t.name: t for t in self.graph.initializer}
        self.uses: dict[str, list[tuple[Any, int]]] = {}
        self.producer: dict[str, Any] = {}
        self.pinned = {v.name for v in self.graph.output}  # values that must stay as they are
        for node in self.graph.node:
            for i, name in enumerate(node.input):
                self.uses.setdefault(name, []).append((node, i))
            for name in node.output:
                self.producer[name] = node
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                for a in node.attribute:
                    if a.name == "value":
                        self.constants[node.output[0]] = a.t
            for sub in subgraphs(node):
                self.pinned |= set(_outer_names(sub))

    def array(self, name: str) -> Array | None:
        """A constant's value; None for a name that is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else np.array(numpy_helper.to_array(tensor))

    def set(self, name: str, array: Array) -> None:
        """Replace the value of a constant; its type stays."""
        tensor = self.constants[name]
        new = numpy_helper.from_array(np.ascontiguousarray(array), tensor.name)
        tensor.CopyFrom(new)
        for value in self.graph.input:  # before IR 4 initializers are inputs too
            if value.name == name:
                for dim, extent in zip(value.type.tensor_type.shape.dim, array.shape, strict=False):
                    dim.dim_value = extent

    def private(self, name: str) -> bool:
        """Whether a constant serves one input of one node and nothing else."""
        return name in self.constants and len(self.uses.get(name, ())) == 1 and name not in self.pinned


def _outer_names(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for sub in subgraphs(node):
            yield from _outer_names(sub)


@dataclass(frozen=True)
class WeightedLayer:
    """A convolution or matrix product with a constant weight. ``tensor``: the constant that holds it."""

    name: str  # of the node, or its first output
    op: str
    tensor: str
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False  # the output channels are not axis 0
    r: int = 0  # filter size of Winograd-domain weights
    problem: str = ""  # why it cannot be pruned

    @property
    def kind(self) -> str:
        """depthwise, 1x1, conv or dense."""
        if self.op not in ("Conv", "ConvTranspose", "Winograd"):
            return "dense"
        if self.op == "Conv" and self.groups > 1 and self.shape[1] == 1:
            return "depthwise"
        return "1x1" if self.op == "Conv" and all(d == 1 for d in self.shape[2:]) else "conv"

    def rows_first(self, w: Array) -> Array:
        """View of the weight with output channels first, as the patterns want it."""
        shape = self.shape
        w = w.reshape(shape)
        if not self.transposed:
            return w
        if self.op == "ConvTranspose":  # [C, K / g, ...] -> [K, C / g, ...]
            parts = w.reshape(self.groups, shape[0] // self.groups, *shape[1:]).swapaxes(1, 2)
            return parts.reshape(self.groups * shape[1], shape[0] // self.groups, *shape[2:])
        return w.swapaxes(-1, -2)

    def rows_back(self, w: Array, stored: tuple[int, ...]) -> Array:
        """The inverse of rows_first, in the shape in which the tensor is stored."""
        if self.transposed and self.op == "ConvTranspose":
            k, c = self.shape[1], self.shape[0] // self.groups
            w = w.reshape(self.groups, k, c, *self.shape[2:]).swapaxes(1, 2)
        elif self.transposed:
            w = w.swapaxes(-1, -2)
        return np.ascontiguousarray(w).reshape(stored)

    def scale(self) -> Array | None:
        """What makes magnitudes comparable within the layer: positions of the Winograd domain differ in scale."""
        return None if not self.r else of_tile(self.shape[-1], self.r).effect


def _source(graph: Graph, name: str) -> str | None:
    """The constant behind ``name``, through operators that keep the order of its elements."""
    for _ in range(8):
        if name in graph.constants:
            return name
        node = graph.producer.get(name)
        if node is None or node.op_type not in _VIEWS or not node.input:
            return None
        name = node.input[0]
    return None


def layers(graph: Graph) -> list[WeightedLayer]:
    """Every layer of the main graph with a constant weight, in graph order."""
    found = []
    for node in graph.graph.node:
        if node.op_type in GATES and node.domain in ("", "ai.onnx"):
            found += [layer for place in (1, 2) if (layer := _recurrent(graph, node, place)) is not None]
        elif (layer := _layer(graph, node)) is not None:
            found.append(layer)
    return found


def _recurrent(graph: Graph, node: Any, place: int) -> WeightedLayer | None:
    """The weights of the inputs (``/W``) or of the state (``/R``), [directions, gates * hidden, ...] as rows."""
    name = node.name or next((o for o in node.output if o), "?")
    tensor = _source(graph, node.input[place])
    if tensor is None or len(graph.constants[tensor].dims) != 3:
        return None
    directions, rows, columns = graph.constants[tensor].dims
    return WeightedLayer(
        f"{name}/{'WR'[place - 1]}", node.op_type, tensor, (directions * rows, columns), problem=_problem(graph, tensor)
    )


def _problem(graph: Graph, tensor: str) -> str:
    """Why a constant cannot be pruned, "" if nothing is wrong."""
    elem = graph.constants[tensor].data_type
    return _other_use(graph, tensor) if elem in _FLOATS else f"weights are {TensorProto.DataType.Name(elem)}"


def _layer(graph: Graph, node: Any) -> WeightedLayer | None:
    name = node.name or next((o for o in node.output if o), "?")
    functions = function_names()
    places: tuple[int, ...]
    if node.domain == DOMAIN and node.op_type in functions:
        places, op = (1,), "Winograd"
    elif node.domain in ("", "ai.onnx"):
        places = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}.get(node.op_type, ())
        op = node.op_type
    else:
        return None
    for place in places:
        tensor = _source(graph, node.input[place]) if place < len(node.input) else None
        if tensor is None:
            continue
        proto = graph.constants[tensor]
        shape: tuple[int, ...] = tuple(proto.dims)
        if op in ("Gemm", "MatMul") or (op == "Conv" and len(shape) > 4):
            while len(shape) > 2 and shape[0] == 1:
                shape = shape[1:]
        if len(shape) < 2:
            continue
        a = attributes(node)
        transposed = op == "ConvTranspose"
        if op == "Gemm":
            transposed = not a.get("transB", 0) if place == 1 else bool(a.get("transA", 0))
        elif op == "MatMul":
            transposed = place == 1
        problem = _problem(graph, tensor)
        r = functions[node.op_type][1] if op == "Winograd" else 0
        return WeightedLayer(name, op, tensor, shape, int(a.get("group", 1)), transposed, r, problem)
    return None


def _other_use(graph: Graph, name: str) -> str:
    """What else than layers reads a constant, "" if nothing."""
    if name in graph.pinned:
        return "weight is also an output or used by a subgraph"
    for node, _ in graph.uses.get(name, ()):
        if node.op_type in _VIEWS:
            for output in node.output:
                if problem := _other_use(graph, output):
                    return problem
        elif node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul", *GATES} and node.domain != DOMAIN:
            return f"weight is also used by {node.op_type}"
    return ""


def read(source: Any) -> dict[str, Array]:
    """Weight of every layer by layer name: copies, in the stored shape. ``source``: path, bytes or ModelProto."""
    from ..onnx_read import read_model

    graph = Graph(read_model(source)[0])
    return {layer.name: graph_array(graph, layer) for layer in layers(graph)}


def graph_array(graph: Graph, layer: WeightedLayer) -> Array:
    array = graph.array(layer.tensor)
    if array is None:
        raise InvalidModel(f"layer '{layer.name}': tensor '{layer.tensor}' has no data; export the model again")
    return array


def write(model: Any, arrays: dict[str, Array]) -> None:
    """Put weights (by layer name, of the same shape) into ``model``. Raises InvalidModel for what does not fit."""
    graph = Graph(model)
    known = {layer.name: layer for layer in layers(graph)}
    for name, array in arrays.items():
        layer = known.get(name)
        if layer is None:
            raise InvalidModel(f"the model has no layer '{name}'; it has {', '.join(known) or 'none'}")
        old = graph_array(graph, layer)
        if old.shape != array.shape:
            raise InvalidModel(f"layer '{name}': weight has shape {old.shape}, not {array.shape}; give the same shape")
        graph.set(layer.tensor, array.astype(old.dtype))
