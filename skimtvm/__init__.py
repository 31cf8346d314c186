"""SkimTVM: compile pruned ONNX networks to sparse CPU modules with Apache TVM.

>>> import skimtvm
>>> module = skimtvm.compile("resnet50-pruned.onnx", "resnet50.so")   # doctest: +SKIP
>>> module = skimtvm.load("resnet50.so")                              # doctest: +SKIP
>>> module.run({"data": image})["logits"]                             # doctest: +SKIP

Importing this package does not import TVM; names are resolved on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors as errors
    from .artifact import read_manifest as read_manifest
    from .compiler import CompileOptions as CompileOptions
    from .errors import SkimError as SkimError
    from .profiler import profile as profile
    from .report import LayerRecord as LayerRecord
    from .report import Manifest as Manifest
    from .report import TensorSpec as TensorSpec
    from .runtime import Module as Module
    from .runtime import load as load

_HOME = {
    "CompileOptions": "compiler",
    "LayerRecord": "report",
    "Manifest": "report",
    "Module": "runtime",
    "SkimError": "errors",
    "TensorSpec": "report",
    "load": "runtime",
    "profile": "profiler",
    "read_manifest": "artifact",
}

__all__ = ["__version__", "compile", "errors", "inspect", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    raise AttributeError(f"module 'skimtvm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def inspect(path: str | os.PathLike[str]) -> Manifest:
    """What the compiled module ``path`` is: its inputs, outputs, layers and the kernel that each layer got, without
    loading it. Raises InvalidArtifact."""
    from .artifact import read_manifest

    return read_manifest(path)


def compile(
    model: Any, output: str | os.PathLike[str] | None = None, *, overwrite: bool = False, **options: Any
) -> Module:
    """Compile ``model`` (path, bytes or onnx.ModelProto), write it to ``output`` (.so) and load it.

    Without ``output`` the module lives in memory only, for as long as the process does. ``options`` are the fields of
    ``CompileOptions``; ``input_shapes`` and ``force`` may be mappings. Raises a SkimError.
    """
    from ._compile import compile_and_load

    return compile_and_load(model, output, overwrite, options)
