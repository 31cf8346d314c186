"""Where the channels of layers go in an ONNX graph: which of them live or die together, who reads them, what they hold.

Every output channel of a layer is a cell. Operators that treat each channel alone pass cells on (normalisation,
activations, pooling, Resize), Concat and Split rearrange them, and two values that are added, multiplied or compared
join theirs pairwise: none of the two goes without the other. So do the inputs and outputs of a group of a grouped or
depthwise convolution. An operator that mixes channels in another way pins its cells, with the reason. Imports onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from ..onnx_infer import inferred
from ..onnx_read import opset_of, skeleton
from .weights import Graph, attributes

Array = npt.NDArray[Any]
Edit = Callable[[Array], None]


@dataclass(frozen=True)
class Slots:
    """Channels of a value: ``cells`` i64[C] on ``axis`` of ``rank`` dimensions; with ``flat`` each is several columns.

    ``held``: f64[C], the number that the channel is everywhere, NaN where it is none or not known.
    """

    cells: Array
    axis: int
    rank: int
    held: Array
    flat: bool = False


@dataclass(frozen=True)
class Producer:
    """A layer that makes channels. ``empty``: bool[C], all weights of the channel are zero."""

    name: str
    cells: Array
    empty: Array


@dataclass(frozen=True)
class End:
    """A layer that reads channels. ``silent``: bool[C], it multiplies the channel by zeros; ``held``: see Slots;
    ``foldable``: a constant can move into its bias, otherwise ``why`` not."""

    name: str
    cells: Array
    silent: Array
    held: Array
    foldable: bool
    why: str


@dataclass(frozen=True)
class Cut:
    """What a removal changes: ``apply`` gets bool[len(cells)], True for the channels that stay."""

    cells: Array
    apply: Edit


class Weights:
    """Which weights are zero, remembered from one round to the next."""

    def __init__(self) -> None:
        self._nonzero: dict[str, tuple[tuple[int, ...], Array]] = {}

    def nonzero(self, name: str, tensor: Any) -> Array:
        """bool[a, b] of a weight [a, b, ...]: whether any of the rest is not zero."""
        shape = tuple(tensor.dims)
        known = self._nonzero.get(name)
        if known is None or known[0] != shape:
            w = numpy_helper.to_array(tensor) != 0
            known = shape, w.reshape(*shape[:2], -1).any(axis=2)
            self._nonzero[name] = known
        return known[1]


class Flow:
    """Cells of all values of ``graph``; ``channel_rules.trace`` fills it, operator by operator."""

    def __init__(self, graph: Graph, weights: Weights) -> None:
        self.graph, self.known = graph, weights
        self.opset = opset_of(graph.model)
        self.dims = dims_of(graph.model)
        self.slots: dict[str, Slots] = {}
        self.producers: list[Producer] = []
        self.ends: list[End] = []
        self.cuts: list[Cut] = []
        self.units: list[Array] = []  # cells of which one must stay
        self._parent: list[int] = []
        self._pins: list[tuple[Array, str]] = []
        self.root = np.zeros(0, np.int64)  # of each cell: the cell that stands for all joined with it
        self.pinned: dict[int, str] = {}  # root -> why it stays

    def finish(self) -> None:
        """After the last operator: pin what leaves the graph, and settle ``root`` and ``pinned``."""
        for value, s in self.slots.items():
            if value in self.graph.pinned:
                self.pin(s.cells, f"'{value}' is an output of the model or read by a subgraph")
            elif value not in self.graph.uses:
                self.pin(s.cells, f"nothing reads '{value}'")
        self.root = np.array([self._find(i) for i in range(len(self._parent))], np.int64)
        for cells, why in self._pins:
            for root in np.unique(self.root[cells]):
                self.pinned.setdefault(int(root), why)

    # ---- cells -------------------------------------------------------------------------------------------------------

    def new(self, count: int) -> Array:
        """Fresh cells."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _find(self, cell: int) -> int:
        parent = self._parent
        while parent[cell] != cell:
            parent[cell] = parent[parent[cell]]
            cell = parent[cell]
        return cell

    def join(self, a: Array, b: Array) -> None:
        """Cell by cell: both go or both stay."""
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self._find(i), self._find(j)
            if x != y:
                self._parent[max(x, y)] = min(x, y)

    def pin(self, cells: Array, why: str) -> None:
        """These cells stay."""
        self._pins.append((cells, why))

    def foreign(self, count: int, why: str) -> Array:
        """Cells of channels that no layer makes."""
        cells = self.new(count)
        self.pin(cells, why)
        return cells

    def stop(self, node: Any, why: str = "") -> None:
        """The node does more than treat channels alone: what it reads stays."""
        reason = f"{node.op_type} '{label(node)}' {why or 'mixes channels in a way that is not followed'}"
        for name in node.input:
            if name in self.slots:
                self.pin(self.slots[name].cells, reason)

    # ---- values ------------------------------------------------------------------------------------------------------

    def put(self, node: Any, slots: Slots, place: int = 0) -> bool:
        """``slots`` are what output ``place`` of ``node`` has; always True."""
        if place < len(node.output) and node.output[place]:
            self.slots[node.output[place]] = slots
        return True

    def value(self, node: Any, place: int = 0) -> Slots | None:
        return self.slots.get(node.input[place]) if place < len(node.input) else None

    def constant(self, node: Any, place: int) -> Array | None:
        """A constant input, None if there is none or it is computed."""
        if place >= len(node.input) or not node.input[place]:
            return None
        tensor = self.graph.constants.get(node.input[place])
        return None if tensor is None else numpy_helper.to_array(tensor)

    def operand(self, node: Any, place: int) -> Array | None:
        """``constant``, also through an Unsqueeze: how Caffe2 writes a factor for each channel."""
        found = self.constant(node, place)
        return unsqueezed(self.graph, node.input[place]) if found is None else found

    def given(self, node: Any, place: int) -> bool:
        return place < len(node.input) and bool(node.input[place])

    def rank_of(self, name: str) -> int | None:
        if name in self.slots:
            return self.slots[name].rank
        dims = self.dims.get(name)
        return None if dims is None else len(dims)

    # ---- changes -----------------------------------------------------------------------------------------------------

    def cut(self, cells: Array, apply: Edit) -> None:
        self.cuts.append(Cut(cells, apply))

    def cut_constant(self, node: Any, place: int, axis: int, cells: Array, span: int = 1) -> None:
        """Along ``axis`` of a constant input only what belongs to living cells stays, ``span`` entries for each."""

        def apply(alive: Array) -> None:
            name = own(self.graph, node, place)
            array = numpy_helper.to_array(self.graph.constants[name])
            self.graph.set(name, np.compress(np.repeat(alive, span), array, axis=axis))

        self.cut(cells, apply)

    def layer(self, node: Any, cells: Array, empty: Array) -> None:
        self.producers.append(Producer(label(node), cells, empty))
        self.units.append(cells)


def label(node: Any) -> str:
    return node.name or next((o for o in node.output if o), "?")


def own(graph: Graph, node: Any, place: int) -> str:
    """Name of a constant input of ``node`` that nothing else reads: the constant itself, or a copy made now."""
    name = node.input[place]
    if graph.private(name):
        return name
    tensor = graph.constants.get(name)
    array = unsqueezed(graph, name) if tensor is None else numpy_helper.to_array(tensor)
    assert array is not None
    fresh = add(graph, name, array)
    graph.uses[name] = [(n, i) for n, i in graph.uses[name] if not (n is node and i == place)]
    if tensor is None and not graph.uses[name] and name not in graph.pinned:
        graph.graph.node.remove(graph.producer[name])
    node.input[place] = fresh
    graph.uses[fresh] = [(node, place)]
    return fresh


def unsqueezed(graph: Graph, name: str) -> Array | None:
    """The value of ``name`` if it is an Unsqueeze of a constant."""
    node = graph.producer.get(name)
    if node is None or node.op_type != "Unsqueeze" or node.input[0] not in graph.constants:
        return None
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1] in graph.constants:
        axes = numpy_helper.to_array(graph.constants[node.input[1]]).tolist()
    return None if axes is None else np.expand_dims(numpy_helper.to_array(graph.constants[node.input[0]]), tuple(axes))


def add(graph: Graph, wish: str, array: Array) -> str:
    """A new initializer named after ``wish``."""
    taken = graph.constants.keys() | graph.producer.keys() | graph.uses.keys() | {v.name for v in graph.graph.input}
    name = next(n for i in range(1, len(taken) + 2) if (n := f"{wish}_{i}") not in taken)
    graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    graph.constants[name] = graph.graph.initializer[-1]
    if graph.model.ir_version < 4:  # where initializers are inputs too
        kind = graph.constants[name].data_type
        graph.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    return name


def unknown(count: int) -> Array:
    return np.full(count, np.nan)


def dims_of(model: Any) -> dict[str, tuple[int | None, ...]]:
    """What shape inference can tell; None for a dimension without a value."""
    try:
        done = inferred(skeleton(model))
    except Exception:  # inference is a help: what it does not know is not touched
        return {}
    found: dict[str, tuple[int | None, ...]] = {}
    values: Sequence[Any] = [*done.graph.value_info, *done.graph.input, *done.graph.output]
    for value in values:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found.setdefault(value.name, tuple(d.dim_value if d.HasField("dim_value") else None for d in dims))
    return found
