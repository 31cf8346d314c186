"""Values of a graph that is being lowered: ordinary tensors and flat buffers, the moves between them, kernel calls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..chooser import Choice
from ..errors import InternalError
from ..layout import natural
from ..report import LayerRecord
from ..schedules import moves
from ..schedules.emit import allocation
from ..schedules.pointwise import Slot
from ..target import CpuTarget
from ._utils import Graph, shape_of
from .nodes import Node, nchw
from .plan_layouts import Key, Place, Plan


class FlatValues:
    """The values of a graph while kernels are emitted: where each lives now, and the calls that put it there."""

    def __init__(
        self, graph: Graph, nodes: list[Node], plan: Plan, target: CpuTarget, choices: Mapping[str, Choice]
    ) -> None:
        self.graph, self.nodes, self.plan, self.target, self.choices = graph, nodes, plan, target, choices
        functions = graph.mod.functions.items()  # those that opaque calls refer to stay
        kept = {gv: f for gv, f in functions if gv.name_hint != "main" and not (f.attrs and "skim.kind" in f.attrs)}
        self.bb = relax.BlockBuilder(tvm.IRModule(kept))
        self.calls: list[tuple[str, LayerRecord]] = []
        self.records: dict[Key, LayerRecord] = {}  # of the kernels that wrote a value
        self.buffers: dict[Key, Any] = {}  # root -> newest version of its flat buffer
        self.ready: set[Key] = set()  # values that their root's buffer holds
        self.tensors: dict[Any, Any] = {}  # value -> ordinary tensor
        self.kernels: dict[Any, Any] = {}
        self.consts: dict[Any, Any] = {}
        self.name_of: dict[Any, str] = {}
        counts: dict[str, int] = {}
        for n in nodes:  # layers carry the model's names; pooling and the like are numbered
            counts[n.kind] = counts.get(n.kind, -1) + 1
            self.name_of[n.var] = n.layer.name if n.layer is not None else f"{n.kind}_{counts[n.kind]}"

    # -- values ------------------------------------------------------------------------------------------------------
    def tensor(self, var: Any) -> Any:
        """``var`` as an ordinary tensor."""
        if var in self.tensors:
            return self.tensors[var]
        place = self.plan.places[var]
        shape = nchw(var)
        goal = natural(*shape)
        if (
            place.channels is None
            and place.channel == 0
            and place.root_layout.natural
            and place.layout == place.root_layout
        ):
            flat = self.buffers[place.root]
        else:
            flat = self._convert(place, Slot(goal, goal.size), self.name_of.get(var, var.name))
        self.tensors[var] = self.bb.emit(relax.op.reshape(flat, shape_of(var)))
        return self.tensors[var]

    def _convert(self, place: Place, goal: Slot, name: str) -> Any:
        """A copy of a placed value in another layout."""
        source, channels = self._slot(place), place.channels

        def make() -> Any:
            if channels is None:
                return moves.emit_copy(source, goal, self.target)
            return moves.emit_select(channels, Slot(place.root_layout, source.size), goal, self.target)

        record = LayerRecord(name, "layout", text(goal))
        key = ("convert", source, goal, channels)
        return self._call(key, "f32_convert", make, [self.buffers[place.root]], goal.size, record)

    def _slot(self, place: Place) -> Slot:
        return Slot(place.layout, place.root_layout.size, place.channel)

    def flat(self, var: Any) -> tuple[Any, Slot, tuple[int, ...] | None]:
        """(buffer, slot, channel selection) of ``var``; converts an ordinary tensor first."""
        place = self.plan.places[var]
        if var not in self.ready:
            if var not in self.tensors:
                raise InternalError(f"value {var.name} is read before it is computed; please report this bug")
            self._import(var, place)
        return self.buffers[place.root], self._slot(place), place.channels

    def _import(self, var: Any, place: Place) -> None:
        """Bring an ordinary tensor into its place."""
        source = natural(*nchw(var))
        buffer = self.bb.emit(relax.op.reshape(self.tensors[var], (source.size,)))
        if place.root_layout.natural and place.layout == place.root_layout and place.channel == 0:
            self.buffers[place.root] = buffer
            self.ready.add(var)
            return
        src, dst = Slot(source, source.size), self._slot(place)
        record = LayerRecord(var.name, "layout", text(src))
        self._write(
            var, ("copy", src, dst), "f32_convert", lambda: moves.emit_copy(src, dst, self.target), [buffer], record
        )

    # -- calls -------------------------------------------------------------------------------------------------------
    def _function(self, key: Any, name: str, make: Callable[[], Any]) -> Any:
        if key not in self.kernels:
            self.kernels[key] = self.bb.add_func(make(), name)
        return self.kernels[key]

    def _call(
        self,
        key: Any,
        name: str,
        make: Callable[[], Any],
        args: list[Any],
        size: int,
        record: LayerRecord,
        out: Any = None,
        workspace: int = 0,
    ) -> Any:
        """``workspace``: floats of scratch, the last argument of the kernel; they take part in the plan of memory."""
        gv = self._function(key, name, make)
        ty = relax.TensorType((size,), "float32")
        types: Any = [ty, relax.TensorType((workspace,), "float32")] if workspace else ty
        if out is None:
            call = relax.call_tir(gv, args, out_ty=types)
        else:
            inplace = [len(args), -1] if workspace else [len(args)]
            call = relax.op.call_tir_inplace(gv, [*args, out], inplace_indices=inplace, out_ty=types)
        if not record.symbol:
            record = dataclasses.replace(record, kernel=record.kernel or name, symbol=gv.name_hint)
        self.calls.append((gv.name_hint, record))
        result = self.bb.emit(call)
        return self.bb.emit(relax.TupleGetItem(result, 0)) if workspace else result

    def _write(
        self,
        key: Key,
        cache: Any,
        name: str,
        make: Callable[[], Any],
        args: list[Any],
        record: LayerRecord,
        workspace: int = 0,
    ) -> None:
        """Call a kernel whose result is ``key``, into its own buffer or into a slice of its root's; called again, for
        another band of rows, it goes on in the same buffer."""
        place = self.plan.places[key]
        size = place.root_layout.size
        if place.root != key and place.root not in self.buffers:
            self.buffers[place.root] = self._allocate(size)
        old = self.buffers.get(place.root)
        record = self.records.get(key, record)
        self.buffers[place.root] = self._call(cache, name, make, args, size, record, out=old, workspace=workspace)
        self.records[key] = self.calls[-1][1]
        self.ready.add(key)

    def _allocate(self, size: int) -> Any:
        """An uninitialised buffer that several kernels fill."""

        record = LayerRecord("concat", "allocate", str(size))
        return self._call(("allocate", size), "allocate", lambda: allocation(size), [], size, record)

    def _const(self, array: np.ndarray[Any, Any]) -> Any:
        """A constant; equal ones (tables, the weights of all steps of a recurrent layer) are shared."""
        key = (str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest())
        if key not in self.consts:
            self.consts[key] = relax.const(array, str(array.dtype))
        return self.consts[key]

    def _contiguous(self, var: Any) -> tuple[Any, Slot]:
        """Like ``flat`` for kernels that need consecutive channels: a selection is copied."""
        buffer, slot, channels = self.flat(var)
        if channels is None:
            return buffer, slot
        place = self.plan.places[var]
        layout, key = place.layout, (var, "copy")
        if place.root_layout.natural:  # images of fewer channels are closer together
            layout = natural(*nchw(var))
        if key not in self.buffers:
            self.buffers[key] = self._convert(place, Slot(layout, layout.size), var.name)
        return self.buffers[key], Slot(layout, layout.size)


def text(slot: Slot) -> str:
    """N x C x H x W of a slot, for reports."""
    lay = slot.layout
    return f"{lay.n}x{lay.c}x{lay.h}x{lay.w}"
