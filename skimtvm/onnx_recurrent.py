"""LSTM, GRU and RNN nodes, step by step: dense layers and element-wise operators in their place.

The products with the inputs of all steps are one dense layer; each step has one more, with the state, whose weights all
steps share. Layers stay as they are (and are refused as unsupported) if sequences end early, an activation takes
parameters, or the steps are too many. Nothing here needs TVM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from .onnx_fold import add_initializer, drop_dead
from .onnx_infer import TypeShape, infer

MOST_STEPS = 1024  # of all such layers of a network: each step is a few kernels of their own
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_PLAIN = frozenset(("Relu", "Tanh", "Sigmoid", "HardSigmoid", "LeakyRelu", "Elu", "Softsign", "Softplus"))

Array = np.ndarray[Any, Any]


@dataclass
class _Emitter:
    """Nodes in place of one recurrent node; every value's name starts with ``prefix``."""

    prefix: str
    graph: Any
    nodes: list[Any] = field(default_factory=list)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"{self.prefix}.{self.count}"

    def op(self, kind: str, *inputs: str, outputs: int = 1, label: str = "", **attrs: Any) -> Any:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), names, name=label, **attrs))
        return names if outputs > 1 else names[0]

    def const(self, array: Array) -> str:
        name = self.name()
        add_initializer(self.graph, name, array)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))


@dataclass(frozen=True)
class _Layer:
    """A recurrent node with what it needs to know. ``inputs``: eight names, empty where there is none."""

    kind: str
    attrs: Mapping[str, Any]
    steps: int
    batch: int
    directions: int
    features: int
    hidden: int
    inputs: tuple[str, ...]

    @property
    def batch_first(self) -> bool:
        return bool(self.attrs.get("layout", 0))

    @property
    def reverse(self) -> bool:
        return self.attrs.get("direction", b"forward") == b"reverse"

    def activations(self, direction: int) -> list[str]:
        names = [a.decode() for a in self.attrs.get("activations", ())] or _DEFAULTS[self.kind] * self.directions
        each = len(_DEFAULTS[self.kind])
        return names[direction * each : (direction + 1) * each]


def unroll(model: Any) -> bool:
    """Replace the recurrent nodes of the main graph in place; True if there were any that could be."""
    if not any(n.op_type in GATES and n.domain in ("", "ai.onnx") for n in model.graph.node):
        return False
    types = infer(model)
    arrays = {t.name: t for t in model.graph.initializer}
    layers = {
        k: layer
        for k, node in enumerate(model.graph.node)
        if node.op_type in GATES and (layer := _read(node, types, arrays)) is not None
    }
    if not layers or sum(layer.steps * layer.directions for layer in layers.values()) > MOST_STEPS:
        return False
    nodes = []
    for k, node in enumerate(model.graph.node):
        nodes += list(_unrolled(node, layers[k], model.graph)) if k in layers else [node]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_dead(model)
    return True


def _read(node: Any, types: Mapping[str, TypeShape], initializers: Mapping[str, Any]) -> _Layer | None:
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    known = [types.get(name, (0, None)) for name in inputs[:3]]
    for elem, shape in known:
        if elem != onnx.TensorProto.FLOAT or shape is None or len(shape) != 3:
            return None
        if not all(isinstance(d, int) and d > 0 for d in shape):
            return None
    (first, second, features), (directions, _, _), (_, _, hidden) = (shape for _, shape in known if shape)
    steps, batch = (second, first) if attrs.get("layout", 0) else (first, second)
    if inputs[4]:  # sequences that end early
        lengths = initializers.get(inputs[4])
        if lengths is None or np.any(onnx.numpy_helper.to_array(lengths) != steps):
            return None
    for k in (5, 6):  # zeros are no state
        if inputs[k] in initializers and not np.any(onnx.numpy_helper.to_array(initializers[inputs[k]])):
            inputs[k] = ""
    layer = _Layer(node.op_type, attrs, steps, batch, directions, features, hidden, tuple(inputs))
    given = [a for d in range(directions) for a in layer.activations(d)]
    plain = len(given) == directions * len(_DEFAULTS[node.op_type]) and set(given) <= _PLAIN
    return layer if plain and not attrs.get("activation_alpha") and not attrs.get("activation_beta") else None


def _unrolled(node: Any, layer: _Layer, graph: Any) -> Iterator[Any]:
    emit = _Emitter(node.name or next(o for o in node.output if o), graph)
    x = layer.inputs[0]
    if layer.batch_first:
        x = emit.op("Transpose", x, perm=[1, 0, 2])
    x = emit.op("Reshape", x, emit.ints(layer.steps * layer.batch, layer.features))
    sequences, finals = [], []
    for d in range(layer.directions):
        values, last = _sequence(emit, layer, d, x)
        joined = emit.op("Concat", *values, axis=0) if len(values) > 1 else values[0]
        sequences.append(emit.op("Reshape", joined, emit.ints(layer.steps, 1, layer.batch, layer.hidden)))
        finals.append(last)
    y = emit.op("Concat", *sequences, axis=1) if len(sequences) > 1 else sequences[0]
    results = [emit.op("Transpose", y, perm=[2, 0, 1, 3]) if layer.batch_first else y]
    for states in zip(*finals, strict=True):
        lifted = [emit.op("Reshape", s, emit.ints(1, layer.batch, layer.hidden)) for s in states]
        state = emit.op("Concat", *lifted, axis=0) if len(lifted) > 1 else lifted[0]
        results.append(emit.op("Transpose", state, perm=[1, 0, 2]) if layer.batch_first else state)
    for name, result in zip(node.output, results, strict=False):
        if name:
            emit.nodes.append(onnx.helper.make_node("Identity", [result], [name]))
    yield from emit.nodes


def _sequence(emit: _Emitter, layer: _Layer, d: int, x: str) -> tuple[list[str], list[str]]:
    """The states h of one direction by step, f32[batch, hidden] each, and its last states (h, and c of an LSTM)."""
    gates, hidden, backwards = GATES[layer.kind], layer.hidden, layer.reverse or d == 1
    late = layer.kind == "GRU" and bool(layer.attrs.get("linear_before_reset", 0))

    def of_direction(at: int, shape: tuple[int, ...], axis: int = 0) -> str:
        name = layer.inputs[at]
        if name and layer.directions > 1:
            name = emit.op("Slice", name, emit.ints(d), emit.ints(d + 1), emit.ints(axis))
        return emit.op("Reshape", name, emit.ints(*shape)) if name else ""

    label = f"{emit.prefix}/{'backward' if backwards else 'forward'}" if layer.directions > 1 else emit.prefix
    w = emit.op("Transpose", of_direction(1, (gates * hidden, layer.features)), perm=[1, 0])
    r = emit.op("Transpose", of_direction(2, (gates * hidden, hidden)), perm=[1, 0])
    product, late_bias = emit.op("MatMul", x, w, label=f"{label}/inputs"), ""
    if bias := of_direction(3, (2 * gates * hidden,)):
        first, second = emit.op("Split", bias, emit.ints(gates * hidden, gates * hidden), outputs=2, axis=0)
        if late:  # of the hidden gate: it is reset together with its product
            second, late_bias = emit.op("Split", second, emit.ints(2 * hidden, hidden), outputs=2, axis=0)
            second = emit.op("Concat", second, emit.const(np.zeros(hidden, np.float32)), axis=0)
        product = emit.op("Add", product, emit.op("Add", first, second))
    parts = [product]
    if layer.steps > 1:
        sizes = emit.ints(*[layer.batch] * layer.steps)
        parts = emit.op("Split", product, sizes, outputs=layer.steps, axis=0)
    weights = [r]
    if layer.kind == "GRU" and not late:
        weights = emit.op("Split", r, emit.ints(2 * hidden, hidden), outputs=2, axis=1)
    peepholes = of_direction(7, (3 * hidden,)) if gates == 4 else ""
    peeps = emit.op("Split", peepholes, emit.ints(hidden, hidden, hidden), outputs=3, axis=0) if peepholes else []
    cell = _Cell(emit, layer, layer.activations(d), weights, late_bias, peeps)
    shape, axis = (layer.batch, hidden), 1 if layer.batch_first else 0
    h, c = of_direction(5, shape, axis), of_direction(6, shape, axis) if gates == 4 else ""
    values = [""] * layer.steps
    for k in range(layer.steps):
        t = layer.steps - 1 - k if backwards else k
        h, c = getattr(cell, layer.kind.lower())(parts[t], h, c, f"{label}/step{t}")
        values[t] = h
    return values, [h, c] if gates == 4 else [h]


@dataclass(frozen=True)
class _Cell:
    """One step of each kind: from the products of its inputs [batch, gates * hidden] and the states (empty: zeros) to
    the next ones. ``weights``: of the state, transposed; ``late_bias``: of a GRU's hidden gate, if it is reset."""

    emit: _Emitter
    layer: _Layer
    activations: list[str]
    weights: list[str]
    late_bias: str
    peepholes: list[str]

    def _activate(self, k: int, value: str) -> str:
        clip = self.layer.attrs.get("clip")
        if clip:
            low, high = (self.emit.const(np.array(v, np.float32)) for v in (-clip, clip))
            value = self.emit.op("Clip", value, low, high)
        return self.emit.op(self.activations[k], value)  # type: ignore[no-any-return]

    def _split(self, value: str, parts: int) -> list[str]:
        sizes = self.emit.ints(*[self.layer.hidden] * parts)
        return list(self.emit.op("Split", value, sizes, outputs=parts, axis=1))

    def _sum(self, *values: str) -> str:
        """Of those that are not zero, of which there is one."""
        terms = [v for v in values if v]
        total = terms[0]
        for term in terms[1:]:
            total = self.emit.op("Add", total, term)
        return total

    def _product(self, h: str, k: int, label: str) -> str:
        return self.emit.op("MatMul", h, self.weights[k], label=label) if h else ""

    def rnn(self, x: str, h: str, c: str, label: str) -> tuple[str, str]:
        return self._activate(0, self._sum(x, self._product(h, 0, label))), ""

    def lstm(self, x: str, h: str, c: str, label: str) -> tuple[str, str]:
        op = self.emit.op
        i, o, f, g = self._split(self._sum(self._product(h, 0, label), x), 4)
        i = self._activate(0, self._sum(i, self._peep(0, c)))
        g = self._activate(1, g)
        new = op("Mul", i, g)
        if c:
            if self.layer.attrs.get("input_forget", 0):
                f = op("Sub", self.emit.const(np.array(1, np.float32)), i)
            else:
                f = self._activate(0, self._sum(f, self._peep(2, c)))
            new = op("Add", op("Mul", f, c), new)
        o = self._activate(0, self._sum(o, self._peep(1, new)))
        return op("Mul", o, self.emit.op(self.activations[2], new)), new

    def _peep(self, k: int, c: str) -> str:
        return self.emit.op("Mul", c, self.peepholes[k]) if c and self.peepholes else ""

    def gru(self, x: str, h: str, c: str, label: str) -> tuple[str, str]:
        op = self.emit.op
        product = self._product(h, 0, label)
        z, r, n = self._split(x, 3)
        if self.layer.attrs.get("linear_before_reset", 0):
            rest = self.late_bias
            if h:
                pz, pr, rest = self._split(product, 3)
                z, r, rest = self._sum(z, pz), self._sum(r, pr), self._sum(rest, self.late_bias)
            n = self._activate(1, self._sum(n, op("Mul", self._activate(0, r), rest) if rest else ""))
        else:
            if h:
                pz, pr = self._split(product, 2)
                z, r = self._sum(z, pz), self._sum(r, pr)
                n = self._sum(n, self._product(op("Mul", self._activate(0, r), h), 1, f"{label}/reset"))
            n = self._activate(1, n)
        z = self._activate(0, z)
        if not h:
            return op("Sub", n, op("Mul", z, n)), ""
        return op("Add", n, op("Mul", z, op("Sub", h, n))), ""
