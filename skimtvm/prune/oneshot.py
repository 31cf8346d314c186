"""Prune an ONNX model in one shot, by magnitude: for models without training data. Imports onnx."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..onnx_read import read_model
from . import dead_channels
from .files import check_output, write_bytes
from .groups import Blocks, Elements, parse
from .guide import Guide, Machine
from .masks import Mask, check_sparsity, smallest
from .onnx_workloads import workloads
from .rules import matching
from .weights import Graph, WeightedLayer, graph_array, layers

Array = npt.NDArray[Any]
KINDS = ("first", "last", "depthwise", "1x1", "conv", "dense")


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after. ``weights`` and ``nnz``: (before, after); ``note``: why it was left alone."""

    name: str
    op: str
    shape: tuple[int, ...]
    weights: tuple[int, int]
    nnz: tuple[int, int]
    note: str = ""

    @property
    def sparsity(self) -> tuple[float, float]:
        """Share of zeros before and after, both of the weights that there are then."""
        a, b = (1 - n / w if w else 0.0 for n, w in zip(self.nnz, self.weights, strict=True))
        return a, b


@dataclass(frozen=True)
class Report:
    """What pruning did to a model; ``channels``: dead channels that were removed, by the layer that made them;
    ``stayed``: why other channels that are empty or unread were not."""

    layers: tuple[LayerChange, ...]
    channels: dict[str, int]
    pattern: str
    stayed: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[int, int]:
        return sum(x.weights[0] for x in self.layers), sum(x.weights[1] for x in self.layers)

    @property
    def nnz(self) -> tuple[int, int]:
        return sum(x.nnz[0] for x in self.layers), sum(x.nnz[1] for x in self.layers)

    def to_json(self) -> str:
        document = dataclasses.asdict(self) | {"weights": self.weights, "nnz": self.nnz}
        for row, layer in zip(document["layers"], self.layers, strict=True):
            row["sparsity"] = layer.sparsity
        return json.dumps(document, ensure_ascii=False)


def prune_model(
    source: Any,
    *,
    sparsity: float | None = None,
    table: Mapping[str, float] | str | Path | None = None,
    pattern: str = "element",
    keep: Iterable[str] = (),
    together: bool = False,
    remove_dead: bool = True,
    machine: Machine | None = None,
) -> tuple[Any, Report]:
    """A pruned copy of ``source`` (path, bytes or ModelProto) and what was done.

    ``sparsity``: share of zeros in every layer, or over all of them if ``together`` (one threshold for the network).
    ``table``: sparsity by layer name or pattern (a mapping, or a JSON file; percent if a value is above 1), the other
    layers stay. ``pattern``: element, block4 (4x1), 4x2, filter, channel, column, or N:M such as 2:4, whose sparsity is
    given. ``keep``: layers to leave alone: kinds (first, last, depthwise, 1x1, conv, dense) or patterns of names.
    ``remove_dead``: drop channels that nothing reads or that are always the same, where that is safe.
    ``machine``: leave layers dense that would not be faster on it, and go no further than makes them faster.
    Raises InvalidOption, InvalidModel.
    """
    model = read_model(source)[0]
    graph = Graph(model)
    found = layers(graph)
    if not found:
        raise InvalidOption("the model has no convolution or matrix product with constant weights: nothing to prune")
    mask = _mask(pattern)
    targets = _targets(found, sparsity, table, fixed=mask is not None)
    kept = _kept(found, keep)
    advice: dict[str, str] = {}
    if machine is not None:
        if together or mask is not None:
            raise InvalidOption(
                "guided pruning decides on each layer; it needs --sparsity or --table, without --global"
            )
        advice = _guided(model, machine, targets, pattern)
    before: dict[str, tuple[WeightedLayer, int, int]] = {}
    notes: dict[str, str] = {}
    chosen: list[WeightedLayer] = []
    done: set[str] = set()
    for layer in found:
        w = graph_array(graph, layer)
        before[layer.name] = layer, w.size, int(np.count_nonzero(w))
        if layer.name in kept:
            notes[layer.name] = f"kept: {kept[layer.name]}"
        elif layer.problem:
            notes[layer.name] = f"kept: {layer.problem}"
        elif layer.name not in targets:
            notes[layer.name] = "kept: not in the table"
        elif targets[layer.name] == 0 and layer.name in advice:
            notes[layer.name] = f"kept: {advice[layer.name]}"
        elif layer.tensor in done:
            notes[layer.name] = "shares its weight with a layer above"
        else:
            done.add(layer.tensor)
            chosen.append(layer)
            if layer.name in advice:
                notes[layer.name] = advice[layer.name]
    tied = {layer.tensor for layer in found if layer.name in kept} & done
    chosen = [layer for layer in chosen if layer.tensor not in tied]
    if together:
        if table is not None or mask is not None or sparsity is None:
            raise InvalidOption("a network-wide threshold needs --sparsity and no --table or N:M pattern")
        _prune_together(graph, chosen, check_sparsity(sparsity), pattern)
    else:
        for layer in chosen:
            w = graph_array(graph, layer)
            rows = layer.rows_first(w)
            rule = mask if mask is not None else Mask(groups=_groups(pattern, layer), scale=layer.scale())
            stay = rule.keep(rows, None if mask is not None else targets[layer.name])
            graph.set(layer.tensor, layer.rows_back(np.where(stay, rows, 0).astype(w.dtype), w.shape))
    dead = dead_channels.remove(model) if remove_dead else dead_channels.Removal({}, {})
    graph.refresh()
    after = {layer.name: graph_array(graph, layer) for layer in layers(graph)}
    rows_out = []
    for name, (layer, size, nnz) in before.items():
        now = after[name]
        change = LayerChange(name, layer.op, tuple(now.shape), (size, now.size), (nnz, int(np.count_nonzero(now))),
                             notes.get(name, ""))  # fmt: skip
        rows_out.append(change)
    return model, Report(tuple(rows_out), dead.channels, pattern, dead.stayed)


def _guided(model: Any, machine: Machine, targets: dict[str, float], pattern: str) -> dict[str, str]:
    """What the machine says about each layer; changes ``targets`` accordingly."""
    groups = parse(pattern)
    kernel = f"bsr{groups.y}" if isinstance(groups, Blocks) and groups.x == 1 and groups.y > 1 else "csr"
    advice: dict[str, str] = {}
    for name, work in workloads(model).items():
        if not targets.get(name):
            continue
        p = Guide({name: work}, machine, kernel=kernel, reach=1 - targets[name]).project(name, 1 - targets[name])
        if not p.worth or 1 - p.target < targets[name]:
            targets[name], advice[name] = (1 - p.target, p.reason) if p.worth else (0.0, p.reason)
    return advice


def prune_file(source: str | Path, output: str | Path, *, overwrite: bool = False, **options: Any) -> Report:
    """``prune_model`` from file to file, written completely or not at all. Raises OutputExists too."""
    target = check_output(output, ".onnx", overwrite=overwrite)
    model, report = prune_model(str(source), **options)
    from onnx import checker

    if model.ByteSize() < 2**31 - 1:
        checker.check_model(model)
        data = model.SerializeToString(deterministic=True)
    else:
        raise InvalidOption(f"output '{target}': the model is larger than 2 GB, which one ONNX file cannot hold")
    write_bytes(target, data, overwrite=overwrite)
    return report


def _mask(pattern: str) -> Mask | None:
    """The mask of an N:M pattern, None for the others (which are checked)."""
    from .masks import NofM

    n, colon, m = pattern.partition(":")
    if colon:
        if not (n.isdecimal() and m.isdecimal()):
            raise InvalidOption(f"pattern '{pattern}' is unknown; N:M patterns look like 2:4")
        return NofM(n=int(n), m=int(m))
    parse(pattern)
    return None


def _groups(pattern: str, layer: WeightedLayer) -> Elements:
    groups = layer.groups if layer.op in ("Conv", "ConvTranspose") else 1
    out = parse(pattern, groups)
    return out if not isinstance(out, Blocks) or groups == 1 else Blocks(out.y, out.x, groups)


def _targets(
    found: list[WeightedLayer], sparsity: float | None, table: Mapping[str, float] | str | Path | None, *, fixed: bool
) -> dict[str, float]:
    given = (sparsity is not None) + (table is not None)
    if fixed:
        if given:
            raise InvalidOption("an N:M pattern has a fixed sparsity; leave --sparsity and --table out")
        return {layer.name: 0.0 for layer in found}
    if given != 1:
        raise InvalidOption("give either a sparsity (0 to below 1) or a table of sparsities by layer")
    if sparsity is not None:
        return {layer.name: check_sparsity(sparsity) for layer in found}
    assert table is not None
    if isinstance(table, Mapping):
        return _from_table(found, table)
    return _from_table(found, *_read_table(Path(table), found))


def _from_table(found: list[WeightedLayer], table: Mapping[str, float], what: str = "table") -> dict[str, float]:
    numbers = {k: v for k, v in table.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if len(numbers) != len(table) or not table:
        raise InvalidOption(f'{what}: give a number for each layer name or pattern, e.g. {{"conv2": 0.9}}')
    percent = 100 if max(numbers.values()) > 1 else 1
    names: dict[str, list[str]] = {}  # layers are also known by their weight tensor
    for layer in found:
        for alias in {layer.name, layer.tensor}:
            names.setdefault(alias, []).append(layer.name)
    out: dict[str, float] = {}
    for pattern, value in numbers.items():
        share = check_sparsity(value / percent, f"{what}: sparsity of '{pattern}'")
        if pattern in names:
            hits = [pattern]
        else:
            try:
                hits = matching(names, pattern)
            except InvalidOption:
                listed = ", ".join(layer.name for layer in found)
                raise InvalidOption(f"{what}: layer pattern '{pattern}' matches nothing; there are: {listed}") from None
        for alias in hits:
            for name in names[alias]:
                out.setdefault(name, share)
    return out


def _read_table(path: Path, found: list[WeightedLayer]) -> tuple[dict[str, float], str]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InvalidOption(f"table '{path}' cannot be read as JSON ({e}); give an object of layer: sparsity") from None
    if isinstance(raw, dict) and isinstance(raw.get("networks"), dict):
        return _seed_table(raw["networks"], found, path), f"table '{path}'"
    if isinstance(raw, dict) and isinstance(raw.get("layers"), dict):
        raw = raw["layers"]
    if not isinstance(raw, dict):
        raise InvalidOption(f"table '{path}': give a JSON object of layer: sparsity")
    return raw, f"table '{path}'"


def _seed_table(networks: Mapping[str, Any], found: list[WeightedLayer], path: Path) -> dict[str, float]:
    """From a file with several networks, in percent, the one most of whose layers are in the model."""
    from ..zoo.tables import weight_of

    known = {alias for layer in found for alias in (layer.name, layer.tensor)}
    best: dict[str, float] = {}
    for network, entry in networks.items():
        for rename in (str, functools.partial(weight_of, network)):
            listed = {rename(layer): float(v) / 100 for layer, v in entry["layers"].items()}
            table = {name: v for name, v in listed.items() if name in known}
            # Heads that serve training only are missing from a deployed network.
            if 2 * len(table) > len(listed) and len(table) > len(best):
                best = table
    if not best:
        raise InvalidOption(
            f"table '{path}': none of its networks ({', '.join(networks)}) has the layers of this model"
        )
    return best


def _kept(found: list[WeightedLayer], keep: Iterable[str]) -> dict[str, str]:
    """Layers to leave alone, and the word that says so."""
    out: dict[str, str] = {}
    for word in (w for w in keep if w):
        if word in KINDS:
            names = [x.name for x in found if x.kind == word]
            names = [found[0].name] if word == "first" else [found[-1].name] if word == "last" else names
        else:
            try:
                names = matching([x.name for x in found], word)
            except InvalidOption as e:
                raise InvalidOption(f"keep '{word}' is neither one of {', '.join(KINDS)} nor a layer: {e}") from None
        for name in names:
            out.setdefault(name, word)
    return out


def _prune_together(graph: Graph, chosen: list[WeightedLayer], sparsity: float, pattern: str) -> None:
    """One threshold for all layers, at which ``sparsity`` of their weights are zero; no layer loses its last group."""
    sizes, counts = [], []
    for layer in chosen:
        groups = _groups(pattern, layer)
        rows = layer.rows_first(graph_array(graph, layer))
        size = Mask(groups=groups, scale=layer.scale()).magnitude(rows).astype(np.float32).reshape(-1)
        size[size.argmax()] = np.inf
        sizes.append(size)
        if type(groups) is not Elements:
            counts.append(groups.sizes(rows.shape).reshape(-1))
    if not chosen:
        return
    drop = _smallest_together(np.concatenate(sizes), np.concatenate(counts) if counts else None, sparsity)
    start = 0
    for layer, size in zip(chosen, sizes, strict=True):
        w = graph_array(graph, layer)
        rows, groups = layer.rows_first(w), _groups(pattern, layer)
        per_group = drop[start : start + size.size].reshape(groups.sums(rows).shape)
        start += size.size
        out = np.where(groups.spread(per_group, rows.shape), 0, rows).astype(w.dtype)
        graph.set(layer.tensor, layer.rows_back(out, w.shape))


def _smallest_together(size: Array, count: Array | None, sparsity: float) -> Array:
    """True at the smallest groups that make up ``sparsity`` of all weights; ``count``: weights in each, None for one."""
    if count is None:
        return smallest(size, sparsity) & np.isfinite(size)
    order = np.argsort(size, kind="stable")
    removed = np.cumsum(count[order]) <= sparsity * count.sum() + 0.5
    drop = np.zeros(size.size, bool)
    drop[order[removed & np.isfinite(size[order])]] = True
    return drop
