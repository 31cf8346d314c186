"""The compiler's view of a tuning log: knobs of a layer, from the record of the same layer or of the nearest one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..schedules.sites import AnyKnobs, PlacedSite, Site, version
from ..target import CpuTarget
from .log import Log, Record, Sparsity

NEAR = 1.5  # the largest ratio of two densities at which knobs are still taken over


def sparsity_of(site: Site) -> Sparsity:
    """Rows are output channels."""
    weight = site.rows_first
    nonzero = weight.reshape(weight.shape[0], -1) != 0
    rows = nonzero.sum(axis=1)
    signature = hashlib.sha256(np.packbits(nonzero).tobytes()).hexdigest()[:12]
    return Sparsity(
        int(rows.sum()), round(float(nonzero.mean()), 6), round(site.stored, 6), round(float(rows.mean()), 3),
        int(rows.max(initial=0)), round(float(rows.std()), 3), signature,
    )  # fmt: skip


def knobs_from(site: Site, raw: Mapping[str, Any], target: CpuTarget, threads: int = 1) -> AnyKnobs | None:
    """The knobs that a record for ``threads`` holds, with the parallel pieces of ``site``; None where they are none of
    today's, or not legal for it."""
    try:
        knobs = type(site.default(target))(**raw)
    except TypeError:
        return None
    return site.adapt(knobs, target, threads)


@dataclass(frozen=True)
class Lookup:
    """``records``: the newest best record of each key, by kernel and workload; ``warnings``: damaged lines, and records
    of another state of a kernel, which are not used."""

    target: CpuTarget
    records: Mapping[tuple[str, Any], tuple[Record, ...]]
    warnings: tuple[str, ...]

    @staticmethod
    def load(folders: Sequence[Path], target: CpuTarget) -> Lookup:
        """``folders``: the first one wins."""
        log = Log.read(tuple(reversed(folders)), target.mcpu)
        found: dict[tuple[str, Any], list[Record]] = {}
        stale = 0
        for record in log.best().values():
            if record.isa != target.isa:
                continue
            if record.version != version(record.kernel, target):
                stale += 1
                continue
            found.setdefault((record.kernel, record.workload), []).append(record)
        warnings = [str(d) for d in log.damage]
        if stale:
            warnings.append(f"{stale} tuning records are of another version of their kernels and not used; tune again")
        return Lookup(target, {k: tuple(v) for k, v in found.items()}, tuple(warnings))

    def __call__(self, site: Site) -> tuple[AnyKnobs, str]:
        """Knobs of ``site``, and what they come from in a few words (empty: the default, of which nothing is known)."""
        default = site.default(self.target)
        records = self.records.get((site.name, site.workload), ())
        if not records:
            return default, ""
        mine = sparsity_of(site)
        distance, record = min(((_distance(site, mine, r), r) for r in records), key=lambda pair: pair[0])
        if distance == math.inf:
            return default, ""
        same = record.sparsity.signature == mine.signature
        where = "" if same else f" at density {record.sparsity.density:.3f}"
        if record.is_default:
            return default, f"tuned{where}: the default is best, {record.time[:10]}"
        knobs = knobs_from(site, record.knobs, self.target, record.threads)
        if knobs is None:
            return default, ""
        return knobs, f"tuned{where}: {record.gain:.2f}x the default, {record.time[:10]}"


def _distance(site: Site, mine: Sparsity, record: Record) -> float:
    """How far a record of the same kernel and workload is from ``site``; infinite beyond NEAR."""
    other = record.sparsity
    apart = 0.0
    if isinstance(site, PlacedSite) and record.layout.split("/")[0] != site.layout.split("/")[0]:
        return math.inf  # one is interleaved, the other is not
    if site.kernel != "dense" and mine.signature != other.signature:
        if min(mine.stored, other.stored) <= 0:
            return math.inf
        apart = 1e-6 + abs(math.log(mine.stored / other.stored))
        if apart > math.log(NEAR) + 1e-6:
            return math.inf
    return apart + 0.1 * (record.layout != site.layout) + 0.01 * (record.threads != 1)
