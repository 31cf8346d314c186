"""Replace layers by calls of hand-written kernels on flat buffers, as planned by ``plan_layouts``.

Opaque values stay ordinary tensors. ``flat`` and ``tensor`` move a value between the two worlds when a reader needs the
other form, once each; for natural layouts that is a reshape, which becomes a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .. import winograd
from ..chooser import Choice
from ..kernels import FEW_ROWS
from ..layout import Phases, natural
from ..report import LayerRecord
from ..schedules import conv2d as conv
from ..schedules import interleaved, moves
from ..schedules.pointwise import Slot, emit_pointwise
from ..schedules.sites import AnyKnobs, Built, Call, ConvSite, FcSite, PlacedSite, Site, WinogradSite
from ..target import CpuTarget
from ..workload import WinogradWorkload
from ._utils import Graph, shape_of, substitute, tensor_leaves
from .bands import BandOrder, Move, Step, taps
from .dilated_images import as_images
from .flat_values import text
from .layers import Layer
from .lower_moves import LowerMoves
from .nodes import Node, classify, nchw
from .plan_layouts import Plan
from .separate_spaces import separate

Chooser = Callable[[Layer], Choice]
KnobSource = Callable[[Site], tuple[AnyKnobs, str]]  # knobs of a layer, and where they come from (empty: the default)


@tvm.transform.module_pass(opt_level=0, name="LowerLayers")
class LowerLayers:
    """``choices``: kernel of each layer by name; ``interleave``: images that share a vector (1: planes); ``knobs``: the
    knobs of each layer (None: the defaults). After the run ``calls`` holds (function name, record) of every kernel call in
    execution order and ``plan`` the places."""

    def __init__(
        self, target: CpuTarget, choices: Mapping[str, Choice], interleave: int = 1, knobs: KnobSource | None = None
    ) -> None:
        self.target, self.choices, self.interleave = target, choices, interleave
        self.knobs: KnobSource = knobs or (lambda site: (site.default(target), ""))
        self.calls: list[tuple[str, LayerRecord]] = []
        self.plan: Plan | None = None

    def transform_module(self, mod: tvm.IRModule, ctx: Any) -> tvm.IRModule:
        graph = Graph.of(mod)
        if graph is None:
            return mod
        nodes = classify(graph, FEW_ROWS, self.interleave)
        bands = None
        if self.interleave > 1:
            reads = lambda n: [*n.inputs, *n.args, *tensor_leaves(graph.defs[n.var])]
            least = {n.var: self._least_rows(n) for n in nodes}
            bands = BandOrder(nodes, self.interleave, self.target.l2_bytes, reads, tensor_leaves(graph.result), least)
        places = (bands.windows, bands.streamed) if bands else ()
        params = list(graph.func.params)
        if self.interleave == 1:
            nodes = as_images(nodes, self.choices)
        self.plan = Plan(nodes, params, self.interleave, *places)
        if self.interleave == 1 and (copied := separate(nodes, self.plan, self.choices, self.target)) is not None:
            nodes, self.plan = copied, Plan(copied, params)
        lowering = _Lowering(self.knobs, bands, graph, nodes, self.plan, self.target, self.choices)
        out = lowering.run()
        self.calls = lowering.calls
        return out

    def _least_rows(self, n: Node) -> int:
        """Output rows that a kernel computes together: a band holds a multiple of them, or ends with the image."""
        winograd = self.choices[n.layer.name].winograd if n.kind == "conv2d" and n.layer is not None else 0
        return max(1, winograd)


class _Lowering(LowerMoves):
    """Emits the calls of each kind of node."""

    def __init__(self, knobs: KnobSource, bands: BandOrder | None, *values: Any) -> None:
        super().__init__(*values)
        self.knobs, self.bands = knobs, bands
        self.steps: dict[Any, list[Step]] = {}  # of each value that is computed band by band
        for item in bands.order if bands else ():
            if isinstance(item, Step):
                self.steps.setdefault(item.node.var, []).append(item)
        self.built: dict[Any, tuple[Built, list[Any], LayerRecord]] = {}  # convolutions, for all their bands
        self.step: Step | None = None  # the band that is being emitted, in interleaved layouts
        self.slides: dict[Any, LayerRecord] = {}

    # -- the module ------------------------------------------------------------------------------------------------
    def run(self) -> tvm.IRModule:
        func = self.graph.func
        for p in func.params:
            self.tensors[p] = p
        with self.bb.function("main", list(func.params), attrs=dict(func.attrs or {})):
            with self.bb.dataflow():
                self._lower_nodes()
                leaves = list(dict.fromkeys(tensor_leaves(self.graph.result)))
                mapping = {leaf: self.tensor(leaf) for leaf in leaves}
                out = self.bb.emit_output(substitute(self.graph.result, mapping))
            self.bb.emit_func_output(out)
        mod = self.bb.get()
        return mod.with_attrs(self.graph.mod.attrs) if self.graph.mod.attrs else mod

    def _lower_nodes(self) -> None:
        for item in self.bands.order if self.bands else self.nodes:
            self.step = item if isinstance(item, Step) else None
            n = item.node if isinstance(item, Step) else item
            for move in self.step.moves if self.step else ():
                self._slide(move)
            getattr(self, f"_lower_{n.kind}")(n)

    def _slide(self, move: Move) -> None:
        slot = self._slot(self.plan.places[move.var])
        args = [self._const(np.array([move.source, move.goal, move.rows], np.int32))]
        record = LayerRecord(self.name_of[move.var], "slide", text(slot))
        record = self.slides.setdefault(move.var, record)
        make = lambda: interleaved.emit_slide(slot)
        old = self.buffers[move.var]
        self.buffers[move.var] = self._call(("slide", slot), "f32_slide", make, args, slot.size, record, out=old)
        self.slides[move.var] = self.calls[-1][1]

    # -- layers ------------------------------------------------------------------------------------------------------
    def _lower_skip(self, n: Node) -> None:
        return

    def _lower_opaque(self, n: Node) -> None:
        call = self.graph.defs[n.var]
        mapping = {leaf: self.tensor(leaf) for leaf in tensor_leaves(call)}
        self.tensors[n.var] = self.bb.emit(substitute(call, mapping), name_hint=n.var.name)

    def _lower_view(self, n: Node) -> None:
        self.flat(n.inputs[0])
        self.ready.add(n.var)

    def _band(self, n: Node) -> list[Any]:
        """The argument of kernels that compute a band of rows (``interleaved.Band``)."""
        return [] if self.step is None else [self._const(np.array(self._rows(n, self.step), np.int32))]

    def _rows(self, n: Node, step: Step) -> list[int]:
        """The values of a ``interleaved.Band``."""
        values = [step.first, step.rows]
        image, row = divmod(step.first, nchw(n.var)[2])
        for k, var in enumerate([*n.inputs, n.var]):
            if var in step.at:
                lay = self.plan.places[var].layout
                stride = 1 if k == len(n.inputs) else taps(n, k).stride
                values.append(step.at[var] - image * (lay.n_pitch // lay.row_pitch) - row * stride)
        return values

    def _calls(self, n: Node, src: Slot) -> tuple[Call, ...]:
        """The calls that compute ``n`` band by band; none where it is computed at once."""
        assert self.bands is not None or n.var not in self.steps
        lay, reach, calls = src.layout, taps(n, 0), []
        for step in self.steps.get(n.var, ()):
            values = self._rows(n, step)
            image, row = divmod(step.first, nchw(n.var)[2])
            at = lay.front + image * lay.n_pitch + (values[2] if lay.window else 0) * lay.row_pitch
            rows = row * reach.stride + reach.low, (row + step.rows - 1) * reach.stride + reach.high + 1
            begin, end = (min(max(at + y * lay.row_pitch, 0), src.size) for y in rows)
            fresh = self.bands is not None and self.bands.together(n.inputs[0], n.var)
            calls.append(Call(tuple(values), (begin, end) if fresh else (0, 0)))
        return tuple(calls)

    def _channel_args(self, n: Node) -> list[Any]:
        """Arguments of the channel operands: constants, or the values of a gate at batch 1."""
        assert n.layer is not None
        out: list[Any] = []
        for item in n.layer.channels:
            if isinstance(item, int):
                gate = self.tensor(n.args[item])
                out.append(self.bb.emit(relax.op.reshape(gate, (nchw(n.var)[1],))))
            else:
                out.append(self._const(np.ascontiguousarray(item, np.float32)))
        return out

    def _lower_conv2d(self, n: Node) -> None:
        layer, wl = n.layer, n.workload
        assert layer is not None and layer.weight is not None
        channels: tuple[int, ...] | None = None
        choice = self.choices[layer.name]
        x = n.inputs[0]
        phases = conv.phases(wl)
        if phases is not None and self.plan.interleave == 1:
            buffer, src = self._phases(x, phases, self.name_of[n.var])
        elif choice.winograd:
            buffer, src = self._contiguous(x)
        else:
            buffer, src, channels = self.flat(x)
            if channels is not None and choice.kernel == "dense" and wl.groups > 1:
                buffer, src = self._contiguous(x)
                channels = None
            elif channels is not None:
                src = Slot(self.plan.places[x].root_layout, src.size, 0)
        dst = self._slot(self.plan.places[n.var])
        residuals = [self._contiguous(t) for t in n.inputs[1:]]
        if n.var not in self.built:
            self.built[n.var] = self._conv_kernel(n, choice, src, dst, tuple(s for _, s in residuals), channels)
        kernel, constants, record = self.built[n.var]
        args = [buffer, *constants, *self._band(n), *self._channel_args(n), *(b for b, _ in residuals)]
        self._write(n.var, kernel.key, kernel.name, kernel.emit, args, record, workspace=kernel.workspace)

    def _conv_kernel(
        self,
        n: Node,
        choice: Choice,
        src: Slot,
        dst: Slot,
        residuals: tuple[Slot, ...],
        channels: tuple[int, ...] | None,
    ) -> tuple[Built, list[Any], LayerRecord]:
        """The kernel of a convolution, its constants without a band, and its record."""
        layer, wl, m = n.layer, n.workload, choice.winograd
        assert layer is not None and layer.weight is not None
        weight, op = layer.weight, "conv2d"
        common: dict[str, Any] = {
            "stored": choice.stored, "workload": wl, "src": src, "dst": dst, "epilogue": layer.program,
            "tensors": residuals, "bands": self._calls(n, src), "layer": self.name_of[n.var],
        }  # fmt: skip
        site: PlacedSite
        if m:
            if not isinstance(wl, WinogradWorkload):
                filters = winograd.phase_filters(wl, weight)
                weight = winograd.transform(m, filters.shape[-1]).forward(filters)
            site = WinogradSite(kernel="csr" if choice.rows else "dense", weight=weight, m=m, **common)
        else:
            op = "dense" if layer.kind == "dense" else "depthwise_conv2d" if wl.groups == wl.c > 1 else op
            if weight.ndim == 2:
                weight = np.ascontiguousarray(weight.T)[:, :, None, None]
            site = ConvSite(kernel=choice.kernel, rows=choice.rows, weight=weight, channels=channels, op=op, **common)
        knobs, origin = self.knobs(site)
        kernel = site.build(knobs, self.target)
        return kernel, self._constants(kernel), self._layer_record(n, op, kernel, choice, origin)

    def _layer_record(self, n: Node, op: str, kernel: Built, choice: Choice, origin: str) -> LayerRecord:
        """Of a layer with weights, as the network has them. ``origin``: of the knobs."""
        layer = n.layer
        assert layer is not None and layer.weight is not None and layer.workload is not None
        return self._record(
            n, op, kernel=kernel.name, reason=choice.reason, macs=layer.workload.macs,
            nnz=int(np.count_nonzero(layer.weight)), weights=layer.weight.size, stored_bytes=kernel.stored_bytes,
            knobs=origin,
        )  # fmt: skip

    def _constants(self, kernel: Built) -> list[Any]:
        """Constant arguments of a convolution; in interleaved layouts without the last one, the band."""
        return [self._const(a) for a in (kernel.constants[:-1] if self.plan.interleave > 1 else kernel.constants)]

    def _phases(self, x: Any, phases: Phases, name: str) -> tuple[Any, Slot]:
        key = self.plan.phase_key(x, phases)
        place = self.plan.places[key]
        if key not in self.ready:
            if x in self.ready or x not in self.tensors:
                buffer, src = self._contiguous(x)
            else:  # an ordinary tensor: split it where it lies
                layout = natural(*nchw(x))
                buffer, src = self.bb.emit(relax.op.reshape(self.tensors[x], (layout.size,))), Slot(layout, layout.size)
            dst = self._slot(place)
            record = LayerRecord(name, "split_phases", f"{text(src)} s{phases.sy},{phases.sx}")
            make = partial(moves.emit_phases, phases, src, dst, self.target)
            self._write(key, ("phases", phases, src, dst), "f32_split_phases", make, [buffer], record)
        return self.buffers[place.root], self._slot(place)

    def _lower_fc(self, n: Node) -> None:
        layer, wl = n.layer, n.workload
        assert layer is not None and layer.weight is not None
        choice = self.choices[layer.name]
        site = FcSite(
            kernel=choice.kernel, stored=choice.stored, workload=wl, weight=layer.weight, epilogue=layer.program,
            residuals=len(n.inputs) - 1, layer=layer.name,
        )  # fmt: skip
        knobs, origin = self.knobs(site)
        kernel = site.build(knobs, self.target)
        inputs = [self.bb.emit(relax.op.reshape(self.tensor(t), (int(np.prod(shape_of(t))),))) for t in n.inputs]
        args = [inputs[0], *(self._const(a) for a in kernel.constants), *self._channel_args(n), *inputs[1:]]
        record = self._layer_record(n, "dense", kernel, choice, origin)
        flat = self._call(kernel.key, kernel.name, kernel.emit, args, wl.m * wl.n, record)
        self.tensors[n.var] = self.bb.emit(relax.op.reshape(flat, shape_of(n.var)))

    def _lower_pointwise(self, n: Node) -> None:
        layer, target = n.layer, self.target
        assert layer is not None
        pairs = [self._contiguous(t) for t in n.inputs]
        slots = tuple(s for _, s in pairs)
        dst = self._slot(self.plan.places[n.var])
        sizes = [int(np.prod(shape_of(n.args[g]))) for g in layer.gates]
        gates = [
            self.bb.emit(relax.op.reshape(self.tensor(n.args[g]), (s,)))
            for g, s in zip(layer.gates, sizes, strict=True)
        ]
        args = [*(b for b, _ in pairs), *self._channel_args(n), *gates, *self._band(n)]
        key = ("pointwise", layer.program, slots, dst)
        name = f"f32_pointwise_{target.isa}"
        if dst.layout.interleave > 1:
            make = partial(interleaved.emit_pointwise, layer.program, slots, dst)
        else:
            make = partial(emit_pointwise, layer.program, slots, dst, target)
        self._write(n.var, key, name, make, args, self._record(n, "pointwise"))
