"""ONNX model in, compiled module and manifest out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from . import pipeline
from .batching import estimates
from .calibration import Calibration, for_target
from .errors import InternalError, InvalidModel, InvalidOption, SkimError
from .importer import ImportedModel, load_model
from .relay_passes.join_sizes import join_sizes
from .relay_passes.lower_layers import KnobSource
from .report import Manifest, Variant
from .schedules.sites import version
from .target import CpuTarget, lowering, resolve
from .tune.log import SHIPPED
from .tune.lookup import Lookup


@dataclass(frozen=True)
class CompileOptions:
    """``batch``: first dimension of every input, or several of them for a module that takes any number of images;
    ``sparse_threshold``: a layer of at most this density runs sparse (default: the cost model decides);
    ``force``: (layer, kernel) pairs; ``dump_ir``: directory for the module after each phase; ``tolerance``: largest
    error, over the largest output of a layer, that a kernel may add for speed: what F(4x4,3x3) adds to ordinary weights
    (about 1e-5) passes the default; ``log``: tuning log to use before the one that comes with the package, or "none" for
    default knobs everywhere; ``calibration``: the measured table to choose
    kernels by, or "none" for the built-in model (default: that of ``log``, else the one that comes with the package)."""

    target: str = "auto"
    batch: int | tuple[int, ...] | None = None
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    sparse_threshold: float | None = None
    force: tuple[tuple[str, str], ...] = ()
    dump_ir: Path | None = None
    tolerance: float = 1e-4
    log: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        if self.batch is not None:
            sizes = [self.batch] if isinstance(self.batch, int) else sorted(set(self.batch))
            if not sizes or not all(type(n) is int and n > 0 for n in sizes):
                raise InvalidOption(f"batch {self.batch!r}: give a whole number from 1, or several of them")
            object.__setattr__(self, "batch", sizes[0] if len(sizes) == 1 else tuple(sizes))
        if self.sparse_threshold is not None and not 0 <= self.sparse_threshold <= 1:
            raise InvalidOption(f"sparse threshold {self.sparse_threshold} is no density; choose a value from 0 to 1")
        if not self.tolerance > 0:
            raise InvalidOption(f"tolerance {self.tolerance} must be positive, for example 1e-4")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of a module with several, ascending; otherwise empty."""
        return self.batch if isinstance(self.batch, tuple) else ()

    def record(self) -> dict[str, object]:
        """What the manifest keeps: everything that changes the code."""
        raw = dataclasses.asdict(self)
        del raw["dump_ir"]
        return raw


@dataclass(frozen=True, eq=False)
class Compiled:
    manifest: Manifest
    executable: Any  # tvm.relax.VMExecutable


def compile_model(
    source: Any, options: CompileOptions | None = None, *, progress: Callable[[str, float], None] | None = None
) -> Compiled:
    """Compile an ONNX file, its bytes or a ModelProto.

    ``progress(phase, fraction)`` is called as the work goes on. Raises SkimError subclasses for anything that a user can
    cause; a bug in the compiler surfaces as InternalError.
    """
    options = options or CompileOptions()
    step = progress or (lambda phase, fraction: None)
    cpu = resolve(options.target)
    lookup = Lookup.load(log_folders(options.log), cpu)
    calibration = find_calibration(options, cpu)
    try:
        lowered = lower_model(source, options, cpu, lookup, step, calibration)
        model, last = lowered[-1]
        mod = last.mod
        if options.batches:
            if any(m.sha256 != model.sha256 for m, _ in lowered):
                raise InvalidModel(f"model {model.name} changed while it was being compiled; compile it again")
            names = [
                "main" if low is last else f"main_{n}" for n, (_, low) in zip(options.batches, lowered, strict=True)
            ]
            mod = join_sizes({name: low.mod for name, (_, low) in zip(names, lowered, strict=True)})
        step("generate code", 0.5)
        executable = build(mod, cpu.tvm())
    except SkimError:
        raise
    except Exception as e:  # TVM raises many types; a user sees one line
        first = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
        raise InternalError(f"compiling {_name(source)} failed: {first.strip()[:300]}") from e
    from . import __version__

    manifest = Manifest(
        skimtvm_version=__version__,
        tvm_version=tvm.__version__,
        target=cpu.mcpu,
        features=cpu.features,
        inputs=model.inputs,
        outputs=model.outputs,
        layers=last.layers,
        calls=last.calls,
        model_sha256=model.sha256,
        model_name=model.name,
        options=options.record(),
        warnings=(*model.warnings, *lookup.warnings, *_outdated(calibration, cpu)),
        batches=options.batches,
        seconds=estimates(options.batches, [(low.layers, len(low.calls)) for _, low in lowered])
        if options.batches
        else (),
        variants=tuple(
            Variant(n, low.layers, low.calls) for n, (_, low) in zip(options.batches[:-1], lowered, strict=False)
        ),
        tools=_tools(),
        choice=f"measured table: {calibration}"
        if calibration
        else f"built-in model: no calibration of {cpu.mcpu}"
        if options.calibration is None
        else "built-in model",
    )
    step("done", 1.0)
    return Compiled(manifest, executable)


def log_folders(log: str | None) -> tuple[Path, ...]:
    """Folders of tuning logs, the one that wins first. Raises InvalidOption."""
    if log == "none":
        return ()
    if log is None:
        return (SHIPPED,)
    if not Path(log).is_dir():
        raise InvalidOption(f"tuning log '{log}' is no folder; give what skimtvm tune --log wrote, or none")
    return (Path(log), SHIPPED)


def find_calibration(options: CompileOptions, cpu: CpuTarget) -> Calibration | None:
    """The measured table that ``options`` ask for. Raises InvalidOption."""
    folders = (Path(options.log),) if options.log not in (None, "none") else ()
    return for_target(options.calibration, (*folders, SHIPPED), cpu.mcpu)


def _outdated(calibration: Calibration | None, cpu: CpuTarget) -> list[str]:
    """A warning if kernels have changed since they were measured. Their times are still the best guess."""
    old = [name for name, v in (calibration.kernels if calibration else {}).items() if v != version(name, cpu)]
    return [f"the calibration measured other versions of {', '.join(old)}; run skimtvm calibrate again"] if old else []


def lower_model(
    source: Any,
    options: CompileOptions,
    cpu: CpuTarget,
    knobs: KnobSource | None = None,
    step: Callable[[str, float], None] = lambda phase, fraction: None,
    calibration: Calibration | None = None,
) -> list[tuple[ImportedModel, pipeline.Lowered]]:
    """The network at each batch size that ``options`` ask for, down to kernel calls; ``knobs``: see ``LowerLayers``;
    ``calibration``: see ``pipeline.run``."""
    return [
        _lower(source, options, cpu, batch, knobs, step, calibration) for batch in options.batches or (options.batch,)
    ]


def _lower(
    source: Any,
    options: CompileOptions,
    cpu: CpuTarget,
    batch: int | tuple[int, ...] | None,
    knobs: KnobSource | None,
    step: Callable[[str, float], None],
    calibration: Calibration | None,
) -> tuple[ImportedModel, pipeline.Lowered]:
    """Import the network and lower it, at one batch size."""
    assert not isinstance(batch, tuple)
    several = len(options.batches)
    done = options.batches.index(batch) if several and batch else 0

    def part(phase: str, fraction: float) -> None:  # lowering all sizes is the first half of the bar
        label = f"{phase}, batch {batch}" if several else phase
        step(label, (0.5 * done + min(fraction, 0.5)) / max(1, several))

    part("import", 0.0)
    shapes = dict(options.input_shapes)
    if several and batch:
        shapes = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
    model = load_model(source, input_shapes=shapes or None, batch=batch)
    single = _single(source, model, options)
    if several and single is None and batch != 1:
        raise InvalidOption(
            f"--batch {','.join(map(str, options.batches))}: the inputs and outputs of {model.name} do not all carry "
            "the batch as their first dimension; give one size"
        )
    dump = options.dump_ir / f"batch_{batch}" if several and options.dump_ir is not None else options.dump_ir
    return model, pipeline.run(
        model.mod,
        cpu,
        single=single,
        keep_apart=several > 0,
        threshold=options.sparse_threshold,
        force=dict(options.force),
        tolerance=options.tolerance,
        winograd=model.winograd,
        calibration=calibration,
        knobs=knobs,
        dump_dir=dump,
        progress=part,
    )


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, str | os.PathLike) else "the model"


def _tools() -> dict[str, str]:
    """Versions of what makes the code; ``artifact.write`` adds the linker."""
    llvm = tvm.get_global_func("target.llvm_version_major", allow_missing=True)
    packages = {name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx")}
    return packages | ({"llvm": str(llvm())} if llvm else {})


def _single(source: Any, model: ImportedModel, options: CompileOptions) -> Any:
    """The network at batch 1, when every input and output carries the same larger batch; None when there is no such."""
    batches = {s.shape[0] if s.shape else 0 for s in (*model.inputs, *model.outputs)}
    if len(batches) != 1 or max(batches) < 2:
        return None
    shapes = {name: (1, *shape[1:]) for name, shape in options.input_shapes}
    try:
        return load_model(source, input_shapes=shapes or None, batch=1).mod
    except SkimError:  # the batch is part of the network's own shapes
        return None


def build(mod: tvm.IRModule, target: Any) -> Any:
    """VM executable of a lowered module: memory plan, VM code, machine code."""
    from tvm import relax

    passes = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
    with target, lowering():
        return relax.build(mod, target=target, relax_pipeline=passes)
