"""The tuning tasks of a network: the layers that differ in kernel, shape, layout or sparsity, with their real weights."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..compiler import CompileOptions, find_calibration, lower_model
from ..schedules.sites import AnyKnobs, Site, version
from ..target import CpuTarget, resolve
from .log import Key, Sparsity
from .lookup import sparsity_of

SIMILAR = 1.25  # densities within this ratio share a task: their best knobs are the same
FEW_MACS = 200_000  # layers that take microseconds are left alone


@dataclass(frozen=True, eq=False)
class Task:
    """``layers``: names of the layers that the result serves; ``macs``: multiply-adds done by ``site``."""

    site: Site
    target: CpuTarget
    threads: int
    sparsity: Sparsity
    layers: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        site, t = self.site, self.target
        return Key(t.mcpu, t.isa, site.name, site.workload, site.layout, self.sparsity.signature, self.threads)

    @property
    def version(self) -> str:
        return version(self.site.name, self.target)

    @property
    def sparse(self) -> bool:
        return self.site.kernel != "dense"

    def __str__(self) -> str:
        density = f" density {self.sparsity.density:.3f}" if self.sparse else ""
        return f"{self.site.name} {self.site.workload}{density}"

    def to_bytes(self) -> bytes:
        return pickle.dumps((self.site, self.target, self.threads))


def extract(source: Any, options: CompileOptions, *, threads: int = 1, dense: bool = False) -> list[Task]:
    """Tasks of an ONNX network as it is compiled with ``options``: sparse layers only unless ``dense``, most work first.

    Raises what ``compile_model`` raises.
    """
    sites: list[Site] = []
    target = resolve(options.target)

    def observe(site: Site) -> tuple[AnyKnobs, str]:
        sites.append(site)
        return site.default(target), ""

    lower_model(source, options, target, observe, calibration=find_calibration(options, target))
    return distinct(sites, target, threads=threads, dense=dense)


def distinct(sites: Iterable[Site], target: CpuTarget, *, threads: int = 1, dense: bool = False) -> list[Task]:
    """One task for all sites of equal kernel, workload and layout whose densities are similar (within SIMILAR)."""
    wanted = [s for s in sites if s.workload.macs * s.stored > FEW_MACS and (dense or s.kernel != "dense")]
    return merge(Task(s, target, threads, sparsity_of(s), (s.layer,)) for s in wanted)


def merge(tasks: Iterable[Task]) -> list[Task]:
    """``tasks``, of several networks perhaps, without those that are alike; most work first."""
    kept: list[Task] = []
    for task in tasks:
        for i, other in enumerate(kept):
            if _alike(task, other):
                kept[i] = dataclasses.replace(other, layers=(*other.layers, *task.layers))
                break
        else:
            kept.append(task)
    return sorted(kept, key=lambda t: -t.site.workload.macs * t.site.stored)


def _alike(a: Task, b: Task) -> bool:
    if dataclasses.replace(a.key, signature="") != dataclasses.replace(b.key, signature=""):
        return False
    if a.site.kernel == "dense":
        return True
    low, high = sorted((a.site.stored, b.site.stored))
    return high <= low * SIMILAR
