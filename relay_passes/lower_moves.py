"""Calls of the kernels without weights: pooling and the like, parts of images, concatenations, products of activations."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import relax

from ..layout import Layout, natural
from ..report import LayerRecord
from ..schedules import crop, dilation, moves
from ..schedules.matmul import Matrices, emit_product
from ..schedules.pointwise import Slot
from ._utils import shape_of, value
from .flat_values import FlatValues, text
from .matrix_views import View
from .nodes import Node, nchw


class LowerMoves(FlatValues):
    """Emits the calls of nodes with one kernel each, or a copy for each part."""

    @abstractmethod
    def _band(self, n: Node) -> list[Any]:
        """The argument of kernels that compute a band of rows (``interleaved.Band``)."""

    def _record(self, n: Node, op: str, **more: Any) -> LayerRecord:
        layer = n.layer
        epilogue = str(layer.program) if layer is not None else ""
        return LayerRecord(
            self.name_of[n.var], op, str(n.workload or "x".join(map(str, nchw(n.var)))), epilogue=epilogue, **more
        )

    def _simple(
        self,
        n: Node,
        op: str,
        emit: Callable[[Slot, Slot], Any],
        tables: Sequence[Any] = (),
        shared: Any = None,
    ) -> None:
        """Kernels with one source and one destination, and constant tables between them. ``shared``: what of the workload
        their code depends on, if not on all of it."""
        buffer, src = self._contiguous(n.inputs[0])
        dst = self._slot(self.plan.places[n.var])
        name, args = f"f32_{op}_{self.target.isa}", [buffer, *(self._const(t) for t in tables), *self._band(n)]
        key = (op, n.workload if shared is None else shared, src, dst)
        self._write(n.var, key, name, lambda: emit(src, dst), args, self._record(n, op))

    def _lower_pool(self, n: Node) -> None:
        self._simple(n, f"{n.workload.kind}_pool2d", lambda s, d: moves.emit_pool(n.workload, s, d, self.target))

    def _lower_relayout(self, n: Node) -> None:
        self._simple(n, "convert", lambda s, d: moves.emit_copy(s, d, self.target))

    def _lower_resize(self, n: Node) -> None:
        tables = n.workload.constants()
        self._simple(n, "resize2d", lambda s, d: moves.emit_resize(n.workload, s, d, self.target), tables)

    def _lower_depth_to_space(self, n: Node) -> None:
        make = lambda s, d: moves.emit_depth_to_space(n.workload, s, d, self.target)
        self._simple(n, "depth_to_space", make)

    def _lower_crop(self, n: Node) -> None:
        shift = np.array([n.workload.shift(self.plan.places[n.inputs[0]].layout)], np.int32)
        self._simple(n, "crop", lambda s, d: crop.emit_crop(n.workload, s, d, self.target), [shift], "window")

    def _lower_pad(self, n: Node) -> None:
        self._simple(n, "pad", lambda s, d: crop.emit_pad(n.workload, s, d, self.target))

    def _lower_to_images(self, n: Node) -> None:
        self._simple(n, "to_images", lambda s, d: dilation.emit_to_images(n.workload, s, d, self.target))

    def _lower_from_images(self, n: Node) -> None:
        self._simple(n, "from_images", lambda s, d: dilation.emit_from_images(n.workload, s, d, self.target))

    def _lower_mosaic(self, n: Node) -> None:
        whole = natural(*nchw(n.var))
        out = self._allocate(whole.size)
        for part, (y, x) in zip(n.inputs, n.workload, strict=True):
            buffer, src = self._contiguous(part)
            _, _, h, w = nchw(part)
            place = dataclasses.replace(whole, h=h, w=w, front=y * whole.row_pitch + x)
            dst = Slot(place, whole.size)
            record = LayerRecord(self.name_of[n.var], "mosaic", text(src))
            make = partial(moves.emit_copy, src, dst, self.target)
            out = self._call(("copy", src, dst), "f32_convert", make, [buffer], whole.size, record, out=out)
        self._as_tensor(n, out)

    def _as_tensor(self, n: Node, flat: Any) -> None:
        """The contiguous result of ``n``, and in its place where it has one."""
        self.tensors[n.var] = self.bb.emit(relax.op.reshape(flat, shape_of(n.var)))
        place = self.plan.place(n.var)
        if place is not None:
            self._import(n.var, place)

    def _lower_lrn(self, n: Node) -> None:
        self._simple(n, "lrn", lambda s, d: moves.emit_lrn(n.workload, s, d, self.target))

    def _lower_norm(self, n: Node) -> None:
        tables = [value(a) for a in n.args]
        op = "layer_norm" if n.workload.centred else "rms_norm"
        self._simple(n, op, lambda s, d: moves.emit_norm(n.workload, s, d, self.target), tables)

    def _lower_mean(self, n: Node) -> None:
        buffer, src = self._contiguous(n.inputs[0])
        layout = natural(*nchw(n.inputs[0])[:2], 1, 1)
        dst = Slot(layout, layout.size)
        make = lambda: moves.emit_global_avg_pool(src, dst, self.target)
        record = self._record(n, "global_avg_pool")
        flat = self._call(("mean", src), f"f32_global_avg_pool_{self.target.isa}", make, [buffer], layout.size, record)
        self._as_tensor(n, flat)

    def _lower_matmul(self, n: Node) -> None:
        product = n.workload
        (a, at), (b, bt) = (self._matrices(v) for v in (product.a, product.b))
        place = self.plan.places[n.var] if product.result.flat else None
        direct = place is not None and not place.layout.zero_halo  # the kernel leaves what is no pixel as it was
        layout: Layout | None = None
        if place is not None and direct:
            layout, size, channel = place.layout, place.root_layout.size, place.channel
        else:
            layout, size, channel = natural(*nchw(n.var)) if place else None, product.size, 0
        work = product.work(at, bt, product.result.matrices(layout, size, channel))
        name, make = f"f32_matmul_{self.target.isa}", partial(emit_product, work, self.target)
        record = LayerRecord(self.name_of[n.var], "matmul", str(product))
        if direct:
            self._write(n.var, work, name, make, [a, b], record)
        else:
            flat = self._call(work, name, make, [a, b], size, record)
            self.tensors[n.var] = self.bb.emit(relax.op.reshape(flat, shape_of(n.var)))

    def _matrices(self, view: View) -> tuple[Any, Matrices]:
        """The buffer of an operand and where it lies in it."""
        if view.flat:
            buffer, slot = self._contiguous(view.root)
            return buffer, view.matrices(slot.layout, slot.size, slot.channel)
        size = int(np.prod(shape_of(view.root)))
        return self.bb.emit(relax.op.reshape(self.tensor(view.root), (size,))), view.matrices(None, size)

    def _lower_concat(self, n: Node) -> None:
        place = self.plan.places[n.var]
        first = place.channel
        for part in n.inputs:
            c = nchw(part)[1]
            in_place = self.plan.slices.get(part, (None, 0))[0] == n.var
            if not in_place:
                self._copy_part(part, n, first, c)
            first += c
        self.ready.add(n.var)

    def _copy_part(self, part: Any, n: Node, first: int, c: int) -> None:
        place = self.plan.places[n.var]
        if part in self.ready or part not in self.tensors:
            buffer, src = self._contiguous(part)
        else:
            layout = natural(*nchw(part))
            buffer, src = self.bb.emit(relax.op.reshape(self.tensors[part], (layout.size,))), Slot(layout, layout.size)
        dst = Slot(dataclasses.replace(place.root_layout, c=c), place.root_layout.size, first)
        if place.root not in self.buffers:
            self.buffers[place.root] = self._allocate(place.root_layout.size)
        record = LayerRecord(self.name_of[n.var], "concat_copy", text(src))
        make = lambda: moves.emit_copy(src, dst, self.target)
        old = self.buffers[place.root]
        self.buffers[place.root] = self._call(
            ("copy", src, dst), "f32_convert", make, [buffer], dst.size, record, out=old
        )
