"""``skimtvm.compile``: compiler, artifact and runtime in one call, whatever state TVM is in."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import artifact, errors
from .runtime import Module, load
from .tvm_runtime import import_compiler

_PAIRS = ("input_shapes", "force")


def compile_and_load(
    model: Any, output: str | os.PathLike[str] | None, overwrite: bool, options: Mapping[str, Any]
) -> Module:
    """See ``skimtvm.compile``."""
    if output is not None:
        artifact.check_output(output, overwrite=overwrite)
    work = Path(tempfile.mkdtemp(prefix="skimtvm-"))
    try:
        target = work / "module.so" if output is None else Path(output)
        if _runtime_only():
            _in_child(model, target, overwrite, options, work)
        else:
            import_compiler()
            from .compiler import compile_model

            artifact.write(compile_model(model, make_options(options)), target, overwrite=overwrite)
        return load(target)  # a loaded file stays mapped when its name goes
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_options(options: Mapping[str, Any]) -> Any:
    """CompileOptions from keywords. Raises InvalidOption for a name that is not a field."""
    from .compiler import CompileOptions

    known = [f.name for f in dataclasses.fields(CompileOptions)]
    for name in options:
        if name not in known:
            raise errors.InvalidOption(f"option '{name}' is unknown; the options are {', '.join(known)}")
    values = dict(options)
    for name in _PAIRS:
        if isinstance(values.get(name), Mapping):
            values[name] = tuple(values[name].items())
    if "input_shapes" in values:
        values["input_shapes"] = tuple((name, tuple(shape)) for name, shape in values["input_shapes"] or ())
    if values.get("dump_ir") is not None:
        values["dump_ir"] = Path(values["dump_ir"])
    return CompileOptions(**values)


def _runtime_only() -> bool:
    """Whether this process has loaded TVM without its compiler, as ``skimtvm.load`` does: that cannot be undone."""
    tvm = sys.modules.get("tvm")
    return bool(tvm is not None and getattr(tvm, "_RUNTIME_ONLY", False))


def _in_child(model: Any, target: Path, overwrite: bool, options: Mapping[str, Any], work: Path) -> None:
    if not isinstance(model, str | os.PathLike):
        file = work / "model.onnx"
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        model = file
    args = [sys.executable, "-m", "skimtvm", "compile", os.fspath(model), "-o", str(target), "--quiet"]
    args += ["--overwrite"] if overwrite else []
    args += flags(options)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(args, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.startswith("skimtvm: error: ")]
        message = lines[-1].removeprefix("skimtvm: error: ") if lines else f"compiler ended: {child.stderr.strip()}"
        raise _error_class(child.returncode)(message)


def flags(options: Mapping[str, Any]) -> Iterator[str]:
    """``CompileOptions`` fields as flags of ``skimtvm compile``."""
    for name, value in options.items():
        flag = "--" + {"input_shapes": "input-shape"}.get(name, name.replace("_", "-"))
        if value is None:
            continue
        if name not in _PAIRS:
            yield f"{flag}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            continue
        for key, item in value.items() if isinstance(value, Mapping) else value:
            yield f"{flag}={key}={item if isinstance(item, str) else ','.join(map(str, item))}"


def _error_class(exit_code: int) -> type[errors.SkimError]:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.SkimError) and kind.exit_code == exit_code:
            return kind
    return errors.InternalError
