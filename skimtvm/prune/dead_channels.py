"""Remove channels that cannot matter from an ONNX graph, where that is safe. Imports onnx.

A channel is dead if every layer that reads it, on all its ways through the graph, multiplies it by zeros, or if it is
the same number everywhere when it gets there (a filter of zeros): 0 can go, another number goes into the reader's bias
unless that pads. Channels that the graph joins (residual sums, depthwise convolutions; see ``channels``) go together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .channel_rules import trace
from .channels import Flow, Weights
from .weights import Graph

Array = npt.NDArray[Any]
_ROUNDS = 50  # a removal may make another channel dead


@dataclass(frozen=True)
class Removal:
    """By name of the layer that makes them: ``channels``, how many were removed; ``stayed``, why others were not that
    are empty (all their weights are zero) or that no layer reads."""

    channels: dict[str, int]
    stayed: dict[str, str]


def remove(model: Any) -> Removal:
    """Remove dead channels of ``model`` in place."""
    graph, weights = Graph(model), Weights()
    removed: Counter[str] = Counter()
    for _ in range(_ROUNDS):
        flow = trace(graph, weights)
        live, dead = _decide(flow)
        if not dead.any():
            break
        for producer in flow.producers:
            if count := int(dead[producer.cells].sum()):
                removed[producer.name] += count
        _apply(flow, dead)
        graph.refresh()
    return Removal(dict(removed), _stayed(flow, live, dead))


def _decide(flow: Flow) -> tuple[Array, Array]:
    """bool[cells]: read for what it is worth by some layer; dead."""
    live = np.zeros(len(flow.root), bool)
    for end in flow.ends:
        fits = np.isfinite(end.held) & ((end.held == 0) | end.foldable)
        live[flow.root[end.cells[~(end.silent | fits)]]] = True
    stays = live.copy()
    stays[list(flow.pinned)] = True
    changed = True
    while changed:  # a layer keeps a channel, which may be joined with others
        changed = False
        for cells in flow.units:
            if len(cells) and not stays[flow.root[cells]].any():
                stays[flow.root[cells[0]]] = changed = True
    return live[flow.root], ~stays[flow.root]


def _apply(flow: Flow, dead: Array) -> None:
    graph = flow.graph
    stale = {name for name, s in flow.slots.items() if dead[s.cells].any()}
    for cut in flow.cuts:
        if dead[cut.cells].any():
            cut.apply(~dead[cut.cells])
    keep = [type(v).FromString(v.SerializeToString()) for v in graph.graph.value_info if v.name not in stale]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(keep)


def _stayed(flow: Flow, live: Array, dead: Array) -> dict[str, str]:
    """Why empty and unread channels of each layer are still there."""
    makers: dict[int, list[tuple[str, bool]]] = {}
    for p in flow.producers:
        for root, empty in zip(flow.root[p.cells].tolist(), p.empty.tolist(), strict=True):
            makers.setdefault(root, []).append((p.name, empty))
    blocked: dict[int, str] = {}
    reached = np.zeros(len(flow.root), bool)
    for end in flow.ends:
        reached[flow.root[end.cells]] = True
        needed = ~end.silent & ~(np.isfinite(end.held) & ((end.held == 0) | end.foldable))
        for root, value in zip(flow.root[end.cells[needed]].tolist(), end.held[needed].tolist(), strict=True):
            why = f"'{end.name}' reads the constant and {end.why}" if np.isfinite(value) else f"'{end.name}' reads them"
            blocked.setdefault(root, why)
    out: dict[str, str] = {}
    for p in flow.producers:
        idle = (p.empty | (reached[flow.root[p.cells]] & ~live[p.cells])) & ~dead[p.cells]
        reasons: Counter[str] = Counter()
        for root in flow.root[p.cells[idle]].tolist():
            others = dict.fromkeys(name for name, empty in makers[root] if name != p.name and not empty)
            if root in flow.pinned:
                reasons[flow.pinned[root]] += 1
            elif root in blocked and others:
                names = ", ".join(f"'{name}'" for name in list(others)[:2])
                reasons[f"joined with channels of {names} that live"] += 1
            else:
                reasons[blocked.get(root, "a layer keeps a channel")] += 1
        if reasons:
            parts = [f"{count} idle channel{'s' * (count != 1)} stay{'s' * (count == 1)}: {why}"
                     for why, count in reasons.most_common(2)]  # fmt: skip
            out[p.name] = "; ".join(parts)
    return out
