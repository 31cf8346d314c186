"""Group each convolution or dense layer with the element-wise operators behind it, and the rest among themselves.

A group becomes a private Relax function with the attributes ``Primitive`` (TVM fuses it as one kernel when no kernel of
ours takes it), ``skim.kind`` and ``skim.layer``. Members have one live result, so no group can depend on itself: whatever
a member reads from outside was computed without the group.

Convolutions are visited from the last to the first: of two convolutions whose results are added, the later one takes the
sum as its epilogue, and its partner's result is ready by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax

from ..schedules.pointwise import BRIEF, OPS
from ._utils import Graph, dtype_of, is_const, op_name, shape_of, tensor_leaves
from .matrix_views import is_factor

Accept = Callable[[Any, dict[Any, None]], bool]  # (value, members so far): whether it may join them
MAX_MEMBERS = 16  # longer chains are cut: registers hold the operands of an epilogue


def anchor_kind(call: Any) -> str:
    """``conv2d`` or ``dense`` for calls with constant weights that have a kernel, else ""."""
    name = op_name(call)
    if name not in ("nn.conv2d", "matmul") or not is_const(call.args[1]) or dtype_of(call.args[1]) != "float32":
        return ""
    if name == "nn.conv2d":
        plain = call.attrs.data_layout == "NCHW" and call.attrs.kernel_layout == "OIHW"
        return "conv2d" if plain and not is_const(call.args[0]) else ""
    ranks = len(shape_of(call.args[0])), len(shape_of(call.args[1]))
    return "dense" if ranks == (2, 2) and not is_const(call.args[0]) else ""


def is_channel_shape(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """A shape that broadcasts to one value a channel of ``out`` (4-D: axis 1, 2-D: last axis)."""
    padded = (1,) * (len(out) - len(shape)) + shape
    return len(shape) <= len(out) and all(
        d == (o if i == 1 else 1) for i, (d, o) in enumerate(zip(padded, out, strict=True))
    )


def operand_kind(arg: Any, out: tuple[int, ...]) -> str:
    """How an operand enters a program: ``t`` tensor, ``c`` channel constant, ``g`` gate, ``s`` scalar, "" not at all."""
    if not hasattr(arg, "ty") or getattr(arg.ty, "shape", None) is None:
        return "s" if isinstance(arg, tvm.tirx.FloatImm | tvm.tirx.IntImm) else ""  # bounds of relax.clip
    shape = shape_of(arg)
    if dtype_of(arg) != "float32":
        return ""
    if is_const(arg):
        if all(d == 1 for d in shape):
            return "s"
        return "c" if is_channel_shape(shape, out) else ""
    if shape == out:
        return "t"
    if len(out) == 4 and shape == (*out[:2], 1, 1):
        return "g"
    return ""


def elementwise(call: Any) -> bool:
    """An operator that a program can hold, on a 2-D or 4-D float32 tensor."""
    name = op_name(call)
    if name not in OPS or dtype_of(call) != "float32" or len(shape_of(call)) not in (2, 4):
        return False
    out = shape_of(call)
    if name == "nn.prelu":
        slope = call.args[1]
        return int(call.attrs.axis) % len(out) == 1 and is_const(slope) and operand_kind(call.args[0], out) == "t"
    kinds = [operand_kind(a, out) for a in call.args]
    return "t" in kinds and all(kinds)


class _Grouper:
    """Finds the members of groups in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = graph.order()
        self.position = {v: i for i, v in enumerate(self.order)}
        self.owner: dict[Any, Any] = {}  # member -> first member of its group
        self.results = set(tensor_leaves(graph.result))

    def grow(self, first: Any, accept: Accept) -> list[Any]:
        """The largest prefix of members, in order, with a single live result."""
        shape = shape_of(first)
        members: dict[Any, None] = {first: None}
        best = [first]
        while len(members) < MAX_MEMBERS:
            candidates = {u for m in members for u in self.graph.users.get(m, ()) if u not in members}
            takeable = [
                u
                for u in candidates
                if u not in self.owner
                and elementwise(self.graph.defs[u])
                and shape_of(u) == shape
                and accept(u, members)
            ]
            if not takeable:
                break
            members[min(takeable, key=self.position.__getitem__)] = None
            live = [
                m for m in members if m in self.results or any(u not in members for u in self.graph.users.get(m, ()))
            ]
            if len(live) == 1 and self._sink(live[0], members):
                best = sorted(members, key=self.position.__getitem__)
        return best

    def _sink(self, live: Any, members: dict[Any, None]) -> bool:
        """The live result is the last member (nothing in the group is computed from it)."""
        return all(self.position[m] <= self.position[live] for m in members)

    def claim(self, members: list[Any]) -> None:
        for m in members:
            self.owner[m] = members[0]


def _gate_free(graph: Graph, batch_one: bool) -> Accept:
    """Epilogues of kernels that mix images in one vector cannot take operands that differ between images."""

    def accept(var: Any, members: dict[Any, None]) -> bool:
        out = shape_of(var)
        kinds = [operand_kind(a, out) for a in graph.defs[var].args]
        return batch_one or "g" not in kinds

    return accept


def _both(first: Accept, second: Accept) -> Accept:
    return lambda var, members: first(var, members) and second(var, members)


@tvm.transform.module_pass(opt_level=0, name="FuseLayers")
class FuseLayers:
    """``gates``: allow operands f32[1, C, 1, 1] in the epilogues of a network of batch 1. ``winograd``: (m, r) of the
    convolutions that stand for native Winograd layers, by name; their functions get the attribute ``skim.winograd``."""

    def __init__(self, gates: bool = True, winograd: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.gates, self.winograd = gates, winograd or {}

    def transform_module(self, mod: tvm.IRModule, ctx: Any) -> tvm.IRModule:
        graph = Graph.of(mod)
        if graph is None:
            return mod
        finder = _Grouper(graph)
        groups: list[tuple[str, list[Any]]] = []
        for var in reversed(finder.order):
            kind = anchor_kind(graph.defs[var])
            if kind:
                accept = _gate_free(graph, self.gates and shape_of(var)[0] == 1)
                if self._native(graph.defs[var]):
                    accept = _both(accept, lambda u, members: op_name(graph.defs[u]) in BRIEF)
                members = finder.grow(var, accept)
                finder.claim(members)
                groups.append((kind, members))
        for var in finder.order:
            if var not in finder.owner and elementwise(graph.defs[var]) and len(shape_of(var)) == 4:
                members = finder.grow(var, lambda u, members: True)
                if len(members) == 1 and is_factor(graph, var):
                    continue
                finder.claim(members)
                groups.append(("pointwise", members))
        groups.sort(key=lambda g: finder.position[g[1][0]])
        counts: dict[str, int] = {}
        for kind, members in groups:
            self._outline(graph, kind, members, counts)
        return graph.module()

    def _native(self, call: Any) -> bool:
        return call.span is not None and call.span.source_name.name in self.winograd

    def _outline(self, graph: Graph, kind: str, members: list[Any], counts: dict[str, int]) -> None:
        first = graph.defs[members[0]]
        index = counts[kind] = counts.get(kind, -1) + 1
        name = first.span.source_name.name if kind != "pointwise" and first.span is not None else f"{kind}_{index}"
        outside: dict[Any, Any] = {}
        inside = set(members)
        for m in members:
            for leaf in tensor_leaves(graph.defs[m]):
                if leaf not in inside and leaf not in outside:
                    outside[leaf] = relax.Var(f"x{len(outside)}", leaf.ty)
        bb = relax.BlockBuilder()
        mapping = dict(outside)
        attrs = {"Primitive": 1, "skim.kind": kind, "skim.layer": name}
        if kind == "conv2d" and self._native(first):
            attrs["skim.winograd"] = list(self.winograd[name])
        with bb.function("main", list(outside.values()), attrs=attrs, private=True):
            with bb.dataflow():
                for m in members[:-1]:
                    mapping[m] = bb.emit(_rebind(graph.defs[m], mapping))
                out = bb.emit_output(_rebind(graph.defs[members[-1]], mapping))
            bb.emit_func_output(out)
        gv = graph.add_function(f"{kind}_{index}", bb.get()["main"])
        graph.replace(members[-1], relax.Call(gv, list(outside)))


def _rebind(call: Any, mapping: dict[Any, Any]) -> Any:
    args = [mapping.get(a, a) if isinstance(a, relax.Var) else a for a in call.args]
    return relax.Call(call.op, args, call.attrs, call.ty_args, call.span)
