"""ONNX model in, compiled module and manifest out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from . import pipeline
from .errors import InternalError, InvalidOption, SkimError
from .importer import ImportedModel, load_model
from .report import Manifest
from .target import resolve


@dataclass(frozen=True)
class CompileOptions:
    """``sparse_threshold``: a layer of at most this density runs sparse (default: the cost model decides);
    ``force``: (layer, kernel) pairs; ``dump_ir``: directory for the module after each phase; ``tolerance``: largest
    relative error, against the largest activation, that a kernel may trade for speed."""

    target: str = "auto"
    batch: int | None = None
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    sparse_threshold: float | None = None
    force: tuple[tuple[str, str], ...] = ()
    dump_ir: Path | None = None
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.sparse_threshold is not None and not 0 <= self.sparse_threshold <= 1:
            raise InvalidOption(f"sparse threshold {self.sparse_threshold} is no density; choose a value from 0 to 1")
        if not self.tolerance > 0:
            raise InvalidOption(f"tolerance {self.tolerance} must be positive, for example 1e-4")

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
    step("import", 0.0)
    model = load_model(source, input_shapes=dict(options.input_shapes) or None, batch=options.batch)
    try:
        lowered = pipeline.run(
            model.mod,
            cpu,
            single=_single(source, model, options),
            threshold=options.sparse_threshold,
            force=dict(options.force),
            dump_dir=options.dump_ir,
            progress=step,
        )
        step("generate code", 0.5)
        executable = build(lowered.mod, cpu.tvm())
    except SkimError:
        raise
    except Exception as e:  # TVM raises many types; a user sees one line
        first = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
        raise InternalError(f"compiling {model.name} failed: {first.strip()[:300]}") from e
    from . import __version__

    manifest = Manifest(
        skimtvm_version=__version__,
        tvm_version=tvm.__version__,
        target=cpu.mcpu,
        features=cpu.features,
        inputs=model.inputs,
        outputs=model.outputs,
        layers=lowered.layers,
        calls=lowered.calls,
        model_sha256=model.sha256,
        model_name=model.name,
        options=options.record(),
        warnings=model.warnings,
        tools=_tools(),
    )
    step("done", 1.0)
    return Compiled(manifest, executable)


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
    with target:
        return relax.build(mod, target=target, relax_pipeline=passes)
