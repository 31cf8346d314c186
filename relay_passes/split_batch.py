"""Run the first part of a network image by image, so that its activations stay in cache, and the rest on the whole batch.

Big activations (56x56 and 28x28 planes of a batch of 16) leave the last-level cache between layers; big weights (fully
connected layers, 7x7 convolutions) are read once a batch instead of once an image. The network is cut at a value that is
the only one alive there, where the model below expects the least time; behind the cut, as many images as fill a vector
may be interleaved (``layout.py``), which wastes no lane and aligns every tap. Both halves come from one simplification
at batch 1 and at batch N; they are the same graph, operator by operator, or the network is left whole (an operator that
mixes images would show as a difference).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from ..chooser import Choice
from ..kernels import FEW_ROWS
from ..layout import round_up
from ..target import CpuTarget
from ..workload import ConvWorkload
from ._utils import Graph, op_name, shape_of, substitute, tensor_leaves
from .layers import read_layer
from .nodes import classify
from .plan_layouts import may_interleave

FLOPS = 100e9  # multiply-adds count twice; a core at about 85% of its peak
WEIGHT_BANDWIDTH = 25e9  # bytes a second, streaming from memory
ACTIVATION_BANDWIDTH = 8e9  # the same for the strided tiles of activations that leave the cache (TLB misses included)
STREAM_BANDWIDTH = 200e9  # for interleaved activations, most of which stay in windows (``bands.py``)
COPY_BANDWIDTH = 20e9
INTERLEAVED = {False: 0.88, True: 0.77}  # time of a direct layer against planes: (dense and blocks, CSR)
# The same of CSR layers of one pixel, and more images than fill a vector: each entry is loaded for one vector of images at
# a time, in planes for as many as fit the registers (4096x9216 and 4096x4096 at 90% zeros, 256 images: 1.4 and 1.8).
ONE_PIXEL = 1.6
PEAK = FLOPS / 0.85


@dataclass(frozen=True)
class Cut:
    """``index``: values before it, in graph order, run image by image; ``interleave``: images that share a vector behind it
    (1: planes); ``reason``: one line."""

    index: int
    interleave: int
    reason: str


def compare(single: Graph, batched: Graph, batch: int) -> str:
    """Why the graphs are not the same network at batch 1 and ``batch``; empty when they are."""
    a, b = single.order(), batched.order()
    if len(a) != len(b):
        return "its graph depends on the batch size"
    for x, y in zip(a, b, strict=True):
        dx, dy = single.defs[x], batched.defs[y]
        name = op_name(dx)
        if name != op_name(dy) or not isinstance(x.ty, relax.TensorType) or not isinstance(y.ty, relax.TensorType):
            return "its graph depends on the batch size"
        sx, sy = shape_of(x), shape_of(y)
        if not sx or sx[0] != 1 or sy != (batch, *sx[1:]):
            return f"{name or 'a layer'} does not keep images apart"
        axis = getattr(getattr(dx, "attrs", None), "axis", None)
        if isinstance(axis, int) and axis % len(sx) == 0 and name not in ("nn.prelu",):
            return f"{name} works across images"
    return ""


@dataclass(frozen=True)
class _Cost:
    """Seconds an image of one value: image by image, the batch as planes, the batch interleaved."""

    single: float
    planes: float
    interleaved: float


def _seconds(choice: Choice, macs: int) -> float:
    """Of the arithmetic of ``macs`` dense multiply-adds, Winograd transforms included."""
    if choice.winograd:
        return 2 * macs * choice.cost / PEAK
    return 2 * macs * choice.stored / FLOPS * (2 if _csr(choice) else 1)


def _csr(choice: Choice) -> bool:
    return choice.rows == 1 and choice.kernel != "dense"


def _cost(
    graph: Graph,
    var: Any,
    batch: int,
    choices: Mapping[str, Choice],
    mixed: Mapping[str, Choice],
    cache: float,
    images: int,
) -> _Cost:
    """``images``: that share a vector in interleaved layouts."""
    moved = _size(var) + sum(_size(leaf) for leaf in tensor_leaves(graph.defs[var]))
    outside = moved * batch > cache
    planes, interleaved = moved / ACTIVATION_BANDWIDTH * outside, moved / STREAM_BANDWIDTH * outside
    call = graph.defs[var]
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.GlobalVar):
        return _Cost(0.0, planes, interleaved)
    func = graph.mod[call.op]
    if not func.attrs or func.attrs.get("skim.kind") not in ("conv2d", "dense"):
        return _Cost(0.0, planes, interleaved)
    layer = read_layer(func)
    assert layer.weight is not None and layer.workload is not None
    choice, other = choices[layer.name], mixed[layer.name]
    seconds = _seconds(choice, layer.workload.macs)
    pixels, lanes = 1, 1.0
    if isinstance(layer.workload, ConvWorkload):
        pixels = layer.workload.out_h * layer.workload.out_w
        lanes = pixels / round_up(layer.workload.out_h * (layer.workload.out_w + 1), 16)
    against = 1.0 if other.winograd else INTERLEAVED[_csr(other)]
    if _csr(other) and pixels == 1 and batch > images:
        against = ONE_PIXEL
    shared = _seconds(other, layer.workload.macs) * against
    # Weights arrive while others are multiplied: a layer takes the longer of the two.
    arrive, arrives = (layer.weight.size * c.weight_bytes / WEIGHT_BANDWIDTH for c in (choice, other))
    return _Cost(
        max(seconds * (1 if lanes > 0.5 else 0.8 / lanes), arrive),
        max(seconds, arrive / batch) + planes,
        max(shared, arrives / batch) + interleaved,
    )


def _size(expr: Any) -> float:
    return 4.0 * math.prod(shape_of(expr))


def find_cut(
    single: Graph,
    batched: Graph,
    batch: int,
    choices: Mapping[str, Choice],
    mixed: Mapping[str, Choice],
    target: CpuTarget,
) -> Cut:
    """Where to cut; index 0 when the whole batch at once is expected to be fastest everywhere. ``mixed``: the kernels where
    images are interleaved."""
    order = single.order()
    position = {v: i for i, v in enumerate(order)}
    outputs = set(tensor_leaves(single.result))
    last = {
        v: max([position[u] for u in single.users.get(v, {})] + ([len(order)] if v in outputs else [])) for v in order
    }
    params_until = max([position[u] for p in single.func.params for u in single.users.get(p, {})], default=0)
    cache = 4.0 * target.l2_bytes  # what a core may expect to keep of the last level
    costs = [_cost(single, var, batch, choices, mixed, cache, target.lanes) for var in order]
    nodes = classify(batched, FEW_ROWS)
    whole = least = sum(c.planes for c in costs)
    best = Cut(0, 1, "the whole batch at once")
    for i in range(len(order) + 1):  # cut before value i
        var = order[i - 1] if i else None
        if var is not None:
            alone = all(position[v] >= i or v.same_as(var) or last[v] < i for v in order[:i])
            if not alone or params_until >= i:
                continue
        done = sum(c.single for c in costs[:i])
        # out of the image's buffer, into the batch, into the next layout
        copies = 3 * _size(var) / COPY_BANDWIDTH if var is not None else 0.0
        ways = [(1, sum(c.planes for c in costs[i:]))]
        if batch % target.lanes == 0 and may_interleave(nodes[i:], target.lanes):
            ways.append((target.lanes, sum(c.interleaved for c in costs[i:])))
        for interleave, rest in ways:
            if done + copies + rest < least:
                least = done + copies + rest
                where = f"image by image up to {var.name}" if var is not None else "the whole batch at once"
                how = f", then {interleave} images in the lanes of a vector" if interleave > 1 else ""
                best = Cut(i, interleave, f"{where}{how}, saves {1e3 * (whole - least) * batch:.1f} ms (model)")
    return best


def halves(single: Graph, batched: Graph, cut: Cut) -> tuple[tvm.IRModule, tvm.IRModule | None]:
    """The first part at batch 1 and the second at the full batch (None when nothing is left)."""
    value = single.order()[cut.index - 1]
    outputs = list(tensor_leaves(single.result))
    whole = len(outputs) == 1 and outputs[0].same_as(value) and isinstance(single.result, relax.Var)
    first = _module(single, list(single.func.params), {}, value)
    if whole:
        return first, None
    old = batched.order()[cut.index - 1]
    param = relax.Var("cut", old.ty)
    return first, _module(batched, [param], {old: param}, batched.result)


def _module(graph: Graph, params: list[Any], mapping: dict[Any, Any], result: Any) -> tvm.IRModule:
    """A module whose main computes ``result`` from ``params``; ``mapping`` names values that are given."""
    needed: dict[Any, None] = {}
    stack = list(tensor_leaves(result))
    while stack:
        var = stack.pop()
        if var in graph.defs and var not in mapping and var not in needed:
            needed[var] = None
            stack.extend(tensor_leaves(graph.defs[var]))
    bb = relax.BlockBuilder()
    known = dict(mapping)
    with bb.function("main", params):
        with bb.dataflow():
            for var in graph.order():
                if var in needed:
                    known[var] = bb.emit(substitute(graph.defs[var], known), name_hint=var.name)
            out = bb.emit_output(substitute(result, known))
        bb.emit_func_output(out)
    functions = {gv: f for gv, f in graph.mod.functions.items() if gv.name_hint != "main"}
    main = bb.get()["main"]
    used: set[Any] = set()
    for block in main.body.blocks:
        for call in (b.value for b in block.bindings if isinstance(b.value, relax.Call)):
            used |= {g for g in (call.op, *call.args) if isinstance(g, tvm.ir.GlobalVar)}
    gv = tvm.ir.GlobalVar("main")
    return tvm.IRModule({**{g: f for g, f in functions.items() if g in used}, gv: main})
