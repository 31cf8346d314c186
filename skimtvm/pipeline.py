"""The compiler as one list: phases in order, each a few Relax passes, with a dump of the module after each.

Only this file orders passes; no pass calls another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from .chooser import Choice, choose
from .errors import InvalidOption
from .formats.stats import analyse
from .relay_passes import simplify_passes
from .relay_passes.fuse_layers import FuseLayers
from .relay_passes.layers import read_layer
from .relay_passes.legalize_rest import legalize_rest
from .relay_passes.lower_layers import LowerLayers
from .relay_passes.verify import verify_lowered
from .report import LayerRecord
from .target import CpuTarget
from .workload import ConvWorkload

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Lowered:
    """``mod``: ready for the VM code generator; ``calls``: (function, record) of each kernel call in order."""

    mod: tvm.IRModule
    layers: tuple[LayerRecord, ...]
    calls: tuple[int, ...]


class _Dump:
    """Writes the module after each phase to ``NN_phase.py`` in a directory."""

    def __init__(self, directory: Path | None) -> None:
        self.directory, self.index = directory, 0

    def __call__(self, phase: str, mod: tvm.IRModule, extra: str = "") -> None:
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / f"{self.index:02d}_{phase}.py").write_text(mod.script())
            if extra:
                (self.directory / f"{self.index:02d}_{phase}.txt").write_text(extra)
        self.index += 1


def choose_kernels(mod: tvm.IRModule, threshold: float | None, force: dict[str, str]) -> dict[str, Choice]:
    """Choice for every convolution and dense layer of a fused module, by layer name."""
    choices: dict[str, Choice] = {}
    for func in mod.functions.values():
        if (
            not isinstance(func, relax.Function)
            or not func.attrs
            or func.attrs.get("skim.kind") not in ("conv2d", "dense")
        ):
            continue
        layer = read_layer(func)
        assert layer.weight is not None and layer.workload is not None
        if isinstance(layer.workload, ConvWorkload):
            stats = analyse(layer.weight, layer.workload.groups)
        else:
            stats = analyse(layer.weight.T)
        choices[layer.name] = choose(layer.name, layer.workload, stats, threshold=threshold, force=force)
    unknown = sorted(set(force) - set(choices))
    if unknown:
        known = ", ".join(sorted(choices)[:12]) + (" ..." if len(choices) > 12 else "")
        raise InvalidOption(f"--force {unknown[0]}: no such layer; the layers are {known}")
    return choices


def run(
    mod: tvm.IRModule,
    target: CpuTarget,
    *,
    threshold: float | None = None,
    force: dict[str, str] | None = None,
    dump_dir: Path | None = None,
    progress: Progress | None = None,
) -> Lowered:
    """Imported module -> lowered module with its report."""
    step, dump = progress or (lambda phase, fraction: None), _Dump(dump_dir)
    dump("import", mod)
    # 1. one canonical form of each layer: constants folded, normalisation folded into weights, NCHW, no exporter noise
    step("simplify", 0.05)
    mod = tvm.transform.Sequential(simplify_passes())(mod)
    dump("simplify", mod)
    # 2. layers: a convolution, dense layer or element-wise chain with its epilogue becomes one function
    step("fuse", 0.15)
    fuse: Any = FuseLayers()
    mod = fuse(mod)
    dump("fuse_layers", mod)
    # 3. sparse or dense, layer by layer
    choices = choose_kernels(mod, threshold, force or {})
    # 4. flat activation buffers, kernels of our own
    step("lower", 0.2)
    lower: Any = LowerLayers(target, choices)
    mod = lower(mod)
    dump("lower_layers", mod, lower.plan.describe() if lower.plan else "")
    # 5. everything else: TVM's definitions of the operators, under a generic schedule
    step("legalize", 0.4)
    with target.tvm():
        mod = legalize_rest(target)(mod)
    dump("legalize_rest", mod)
    layers, calls = verify_lowered(mod, lower.calls)
    return Lowered(mod, layers, calls)
