"""The compiler as one list: phases in order, each a few Relax passes, with a dump of the module after each.

Only this file orders passes; no pass calls another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from .calibration import Calibration
from .chooser import Choice, choose
from .errors import InternalError, InvalidOption, OutputExists
from .formats.stats import analyse
from .relay_passes import simplify_passes
from .relay_passes._utils import Graph, shape_of
from .relay_passes.canonicalize import NATIVE
from .relay_passes.fuse_layers import FuseLayers
from .relay_passes.join_batch import join
from .relay_passes.layers import Layer, read_layer
from .relay_passes.legalize_rest import legalize_rest
from .relay_passes.lower_layers import KnobSource, LowerLayers
from .relay_passes.per_image import mixing
from .relay_passes.split_batch import Cut, compare, find_cut, halves
from .relay_passes.verify import verify_lowered
from .report import LayerRecord
from .schedules.pointwise import BRIEF
from .target import CpuTarget
from .winograd import expected_error, phase_filters
from .workload import ConvWorkload, WinogradWorkload

Progress = Callable[[str, float], None]
_LITERALS = re.compile(r"\.quad [0-9a-fx,]+")  # the nonzeros of straight code, megabytes that nobody reads


@dataclass(frozen=True)
class Lowered:
    """``mod``: ready for the VM code generator; ``calls``: (function, record) of each kernel call in order."""

    mod: tvm.IRModule
    layers: tuple[LayerRecord, ...]
    calls: tuple[int, ...]


class _Dump:
    """Writes the module after each phase to ``NN_phase.py`` in a directory, which may hold nothing but older dumps."""

    def __init__(self, directory: Path | None) -> None:
        self.directory, self.index = directory, 0
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            strangers = [f.name for f in directory.iterdir() if not re.fullmatch(r"\d\d_\w+\.(py|txt)", f.name)]
        except OSError as e:
            raise OutputExists(f"--dump-ir {directory}: {e.strerror or e}; name another folder") from None
        if strangers:
            raise OutputExists(f"--dump-ir {directory} holds other files ({strangers[0]}); name an empty folder")
        for old in directory.iterdir():
            old.unlink()

    def __call__(self, phase: str, mod: tvm.IRModule, extra: str = "") -> None:
        if self.directory is not None:
            (self.directory / f"{self.index:02d}_{phase}.py").write_text(_LITERALS.sub(".quad ...", mod.script()))
            if extra:
                (self.directory / f"{self.index:02d}_{phase}.txt").write_text(extra)
        self.index += 1


def choose_kernels(
    mod: tvm.IRModule,
    threshold: float | None,
    force: dict[str, str],
    tolerance: float = 1e-4,
    calibration: Calibration | None = None,
    interleave: int = 1,
) -> dict[str, Choice]:
    """Choice for every convolution and dense layer of a fused module, by layer name. ``interleave``: images that share a
    vector."""
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
        native = isinstance(layer.workload, WinogradWorkload)
        brief = all(instr.op in BRIEF for instr in layer.program.instrs)
        if isinstance(layer.workload, ConvWorkload) and layer.workload.undilated is not None:
            brief &= interleave == 1 and len(layer.inputs) == 1  # residuals lie in other images
        choices[layer.name] = choose(
            layer.name,
            layer.workload,
            stats,
            threshold=threshold,
            force=force,
            tolerance=tolerance,
            winograd_error=partial(_winograd_error, layer) if not native and brief else None,
            calibration=calibration,
            interleave=interleave,
        )
    unknown = sorted(set(force) - set(choices))
    if unknown:
        known = ", ".join(sorted(choices)[:12]) + (" ..." if len(choices) > 12 else "")
        raise InvalidOption(f"--force {unknown[0]}: no such layer; the layers are {known}")
    return choices


def _winograd_error(layer: Layer, m: int) -> float:
    assert layer.weight is not None and isinstance(layer.workload, ConvWorkload)
    return expected_error(phase_filters(layer.workload, layer.weight), m)


def run(
    mod: tvm.IRModule,
    target: CpuTarget,
    *,
    single: tvm.IRModule | None = None,
    keep_apart: bool = False,
    threshold: float | None = None,
    force: dict[str, str] | None = None,
    tolerance: float = 1e-4,
    winograd: Mapping[str, tuple[int, int]] | None = None,
    calibration: Calibration | None = None,
    knobs: KnobSource | None = None,
    dump_dir: Path | None = None,
    progress: Progress | None = None,
) -> Lowered:
    """Imported module -> lowered module with its report.

    ``single``: the same network imported at batch 1, when ``mod`` has a larger batch; its first layers may then run image
    by image (``split_batch``). ``keep_apart``: raise InvalidOption unless the images of a batch are known to be
    independent of each other. ``tolerance``: error over a layer's largest output that a kernel may add.
    ``winograd``: (m, r) of the convolutions that stand for native Winograd layers, by name. ``calibration``: the
    measured table that kernels are chosen by (None: the built-in model). ``knobs``: the knobs of each layer's kernel
    (None: the defaults).
    """
    step, dump = progress or (lambda phase, fraction: None), _Dump(dump_dir)
    dump("import", mod)
    # 1. one canonical form of each layer: constants folded, normalisation folded into weights, NCHW, no exporter noise
    step("simplify", 0.05)
    native = winograd or {}
    simplify = tvm.transform.Sequential(simplify_passes())
    mod = simplify(mod.with_attr(NATIVE, list(native)))
    dump("simplify", mod)
    if single is not None:
        single = simplify(single.with_attr(NATIVE, list(native)))
        batch = shape_of(mod["main"].params[0])[0]
        if why := mixing(single, mod, batch):
            if keep_apart:
                raise InvalidOption(f"--batch: several sizes need images that do not touch, but {why}; give one size")
            single = None
    # 2. layers: a convolution, dense layer or element-wise chain with its epilogue becomes one function
    step("fuse", 0.15)
    whole = _fuse(mod, native, gates=True)
    dump("fuse_layers", whole)
    # 3. sparse or dense, layer by layer
    choices = choose_kernels(whole, threshold, force or {}, tolerance, calibration)
    if single is not None:
        lanes = target.lanes
        full = batch % lanes == 0
        mixed = choose_kernels(whole, threshold, force or {}, tolerance, calibration, lanes) if full else choices
        parts = _split(mod, single, target, choices, mixed, native)
        if parts is not None:
            first, second, batch, cut = parts
            step("lower", 0.2)
            then = mixed if cut.interleave > 1 else choices
            rest = _lower(second, target, then, dump, "", cut.interleave, knobs) if second is not None else None
            if first is None:
                assert rest is not None
                return rest
            one = _lower(first, target, choices, dump, "image_", 1, knobs)
            reports = (one.layers, one.calls), (rest.layers, rest.calls) if rest else ((), ())
            joined = Lowered(*join(one.mod, rest.mod if rest else None, reports, batch, target, cut.reason))
            dump("join_batch", joined.mod)
            return joined
    step("lower", 0.2)
    return _lower(whole, target, choices, dump, "", 1, knobs)


def _fuse(mod: tvm.IRModule, winograd: Mapping[str, tuple[int, int]], *, gates: bool) -> tvm.IRModule:
    fuse: Any = FuseLayers(gates, winograd)
    fused: tvm.IRModule = fuse(mod)
    found = {str(f.attrs["skim.layer"]) for f in fused.functions.values() if f.attrs and "skim.winograd" in f.attrs}
    if found != set(winograd):
        lost = ", ".join(sorted(set(winograd) - found))
        raise InternalError(f"native Winograd layers were lost in the graph passes: {lost}; please report this bug")
    return fused


def _split(
    mod: tvm.IRModule,
    single: tvm.IRModule,
    target: CpuTarget,
    choices: dict[str, Choice],
    mixed: dict[str, Choice],
    winograd: Mapping[str, tuple[int, int]],
) -> tuple[tvm.IRModule | None, tvm.IRModule | None, int, Cut] | None:
    """Both halves of a network that gains from running its first layers image by image, or from interleaved images, for
    which ``mixed`` are the kernels."""
    batched, one = (Graph.of(_fuse(m, winograd, gates=False)) for m in (mod, single))
    if batched is None or one is None:
        return None
    batch = shape_of(batched.func.params[0])[0]
    if compare(one, batched, batch):
        return None
    cut = find_cut(one, batched, batch, choices, mixed, target)
    if cut.index:
        return (*halves(one, batched, cut), batch, cut)
    return (None, batched.mod, batch, cut) if cut.interleave > 1 else None


def _lower(
    mod: tvm.IRModule,
    target: CpuTarget,
    choices: dict[str, Choice],
    dump: _Dump,
    prefix: str,
    interleave: int,
    knobs: KnobSource | None,
) -> Lowered:
    """Fused module -> kernel calls."""
    # 4. flat activation buffers, kernels of our own
    lower: Any = LowerLayers(target, choices, interleave, knobs)
    mod = lower(mod)
    dump(f"{prefix}lower_layers", mod, lower.plan.describe() if lower.plan else "")
    # 5. everything else: TVM's definitions of the operators, under a generic schedule
    with target.tvm():
        mod = legalize_rest(target)(mod)
    dump(f"{prefix}legalize_rest", mod)
    return Lowered(mod, *verify_lowered(mod, lower.calls))
