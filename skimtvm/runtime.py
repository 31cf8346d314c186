"""Load a compiled module, check what is fed to it, run it. Needs TVM's 3 MB runtime library, never its compiler."""

from __future__ import annotations

import difflib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import quiet_tvm, read_manifest
from .batching import pieces, plan
from .errors import (
    EnvironmentProblem,
    IncompatibleTarget,
    InputMismatch,
    InternalError,
    InvalidArtifact,
    SkimError,
)
from .report import Manifest, TensorSpec
from .target import host_features
from .tvm_runtime import check_threads, import_tvm, with_threads

ALIGNMENT = 64  # bytes; kernels use aligned vector moves, which fault on anything less
_SHORT = {"float": "f", "int": "i", "uint": "u", "complex": "c"}

# ---- loading -----------------------------------------------------------------------------------------------------

_libraries: dict[tuple[object, ...], tuple[Any, Manifest]] = {}
_libraries_lock = threading.Lock()


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Module:
    """Load the module ``path``; ``threads`` is the default for its runs (None: all CPUs of the affinity mask).

    A file that is loaded twice is in memory once, and the two modules share nothing that changes. Raises
    InvalidArtifact for a file that is damaged, foreign or of another version, IncompatibleTarget if this CPU lacks an
    instruction set that the code uses.
    """
    check_threads(threads)
    where = f"module '{os.fspath(path)}'"
    with _libraries_lock:
        key = _identity(path)
        if key not in _libraries:
            manifest = read_manifest(path)
            check_compatible(manifest, where)
            library = _open(path, where)
            if _identity(path) != key:
                raise InvalidArtifact(f"{where} was replaced while it was being loaded; load it again")
            _libraries[key] = library, manifest
        library, manifest = _libraries[key]
    return Module(Path(path), library, manifest, threads)


def _identity(path: str | os.PathLike[str]) -> tuple[object, ...]:
    try:
        s = os.stat(path)
    except OSError as e:
        raise InvalidArtifact(f"module '{os.fspath(path)}' cannot be read: {e.strerror}; check its name") from None
    return os.path.realpath(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def check_compatible(manifest: Manifest, where: str) -> None:
    """Raise unless this machine and this installation can run the module: before its code is mapped, because the
    first sign of a missing instruction set would otherwise be SIGILL."""
    have = host_features()
    missing = [f for f in manifest.features if f not in have]
    if have and missing:
        raise IncompatibleTarget(
            f"{where} was compiled for {manifest.target}; this CPU lacks {', '.join(missing)}; "
            "recompile with --target auto on this machine"
        )
    from . import __version__

    for name, made, mine in (
        ("TVM", manifest.tvm_version, _tvm_version()),
        ("skimtvm", manifest.skimtvm_version, __version__),
    ):
        if made.split(".")[:2] != mine.split(".")[:2]:
            raise InvalidArtifact(f"{where} was made with {name} {made}, this is {name} {mine}; recompile the model")


def _tvm_version() -> str:
    return str(import_tvm().__version__)


def _open(path: str | os.PathLike[str], where: str) -> Any:
    import_tvm()
    import tvm_ffi

    real = os.path.realpath(path)
    if not real.endswith(".so"):
        raise InvalidArtifact(f"{where}: the name of the file must end in .so for TVM to load it; rename it")
    try:
        with quiet_tvm():
            return tvm_ffi.load_module(real)
    except Exception as e:
        reason = str(e).strip().splitlines()
        raise EnvironmentProblem(
            f"{where} cannot be mapped ({reason[-1] if reason else e}); is its folder on a file system without exec?"
        ) from e


# ---- running -----------------------------------------------------------------------------------------------------


class Module:
    """A compiled network. ``run`` may be called from several threads at once."""

    def __init__(self, path: Path, library: Any, manifest: Manifest, threads: int | None) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self._library = library
        # A VM runs one call at a time: each run takes an idle one, or makes one (0.1 ms, no copy of the weights).
        self._idle: deque[Any] = deque()
        self._idle.append(self.new_vm()[0])

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.manifest.outputs

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that were compiled, ascending, if there are several: such a module runs any number of images,
        and ``inputs`` and ``outputs`` have the shapes of the largest. Empty if it takes exactly those shapes."""
        return self.manifest.batches

    def __repr__(self) -> str:
        return f"Module({str(self.path)!r}, {describe(self.inputs)} -> {describe(self.outputs)})"

    def run(self, feeds: Any, *, threads: int | None = None) -> dict[str, np.ndarray]:
        """Run the network on ``feeds``, a mapping from input name to array, or one array if there is one input.

        An array is a NumPy array or a CPU tensor that speaks DLPack, C-contiguous, with exactly the shape and dtype
        of the input; in a module of several ``batches`` the first dimension may be any number of images, the same for
        all inputs, which run in the sizes of ``batching.plan``. It is used in place if it starts at a multiple of 64
        bytes and may be written to; otherwise it is copied. Returns arrays by output name, which stay valid and belong
        to the caller. Raises InputMismatch.
        """
        count = check_threads(self.threads if threads is None else threads)
        arrays = self.bind(feeds)
        if not self.batches:
            return self._run_one(arrays, None, count)
        images = arrays[0].shape[0]
        sizes = plan(images, self.batches, self.manifest.seconds)
        parts = [self._run_one(some, size, count) for size, some in pieces(arrays, sizes)]
        if len(parts) == 1:
            return {name: array[:images] for name, array in parts[0].items()}
        return {spec.name: np.concatenate([p[spec.name] for p in parts])[:images] for spec in self.outputs}

    def _run_one(self, arrays: Sequence[np.ndarray], batch: int | None, threads: int) -> dict[str, np.ndarray]:
        tensors = [as_tensor(a) for a in arrays]
        result = with_threads(threads, lambda: self._invoke(tensors, self.manifest.function(batch)))
        return self._unpack(result, arrays)

    def bind(self, feeds: Any) -> list[np.ndarray]:
        """The arrays of ``feeds`` in the order of the inputs, checked. Raises InputMismatch."""
        if not isinstance(feeds, Mapping):
            if len(self.inputs) != 1:
                raise InputMismatch(
                    f"module has {len(self.inputs)} inputs: pass a mapping with {describe(self.inputs)}"
                )
            feeds = {self.inputs[0].name: feeds}
        known = [spec.name for spec in self.inputs]
        for name in feeds:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f"did you mean '{close[0]}'?" if close else f"feed {describe(self.inputs) or 'nothing'}"
                raise InputMismatch(f"input '{name}' is unknown to this module; {hint}")
        for spec in self.inputs:
            if spec.name not in feeds:
                raise InputMismatch(f"input '{spec.name}' is missing; feed {describe([spec])}")
        if not self.batches:
            return [check_array(spec, feeds[spec.name]) for spec in self.inputs]
        first = _to_numpy(self.inputs[0], feeds[self.inputs[0].name])
        images = first.shape[0] if first.ndim else 0
        if not images:
            raise InputMismatch(f"input '{self.inputs[0].name}': got no images; feed {describe(self.inputs)}, or fewer")
        return [check_array(spec.with_batch(images), feeds[spec.name]) for spec in self.inputs]

    def new_vm(self, batch: int | None = None) -> tuple[Any, Callable[..., Any]]:
        """A virtual machine of its own over the shared library, and its function for ``batch`` (None: the largest)."""
        tvm = import_tvm()
        from tvm.runtime.vm import VirtualMachine

        vm = VirtualMachine(self._library, tvm.cpu())
        return vm, vm[self.manifest.function(batch)]

    def _take(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self.new_vm()[0]

    def _invoke(self, tensors: Sequence[Any], function: str) -> Any:
        vm = self._take()
        try:
            result = vm[function](*tensors)
        except SkimError:
            raise
        except Exception as e:  # the VM is in an unknown state: dropped
            reason = str(e).strip().splitlines()
            raise InternalError(f"module '{self.path}' failed while running: {reason[-1] if reason else e}") from e
        self._idle.append(vm)
        return result

    def _unpack(self, result: Any, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        tensors = [result] if hasattr(result, "__dlpack__") else list(result)
        if len(tensors) != len(self.outputs):
            raise InternalError(f"module '{self.path}' returned {len(tensors)} outputs, not {len(self.outputs)}")
        outputs: dict[str, np.ndarray] = {}
        for spec, tensor in zip(self.outputs, tensors, strict=True):
            array = np.from_dlpack(tensor)
            # An output that is an input passed through, or another output again, would change under its owner's feet.
            if any(np.may_share_memory(array, other) for other in (*arrays, *outputs.values())):
                array = array.copy()
            outputs[spec.name] = array
        return outputs


def as_tensor(array: np.ndarray) -> Any:
    """``array`` (C-contiguous) as a TVM tensor: the same memory if it is aligned and writable, otherwise a copy."""
    tvm = import_tvm()
    if not array.size:
        return tvm.runtime.empty(array.shape, str(array.dtype))
    if array.flags.writeable and _address(array) % ALIGNMENT == 0:
        # Through one dimension, so that axes of length 1 get the strides that kernels check for.
        return tvm.runtime.from_dlpack(array.reshape(-1).reshape(array.shape))
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -_address(memory) % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm.runtime.from_dlpack(copy)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def check_array(spec: TensorSpec, value: Any) -> np.ndarray:
    """``value`` as a NumPy array over the same memory, if it is what ``spec`` asks for; otherwise InputMismatch."""
    array = _to_numpy(spec, value)
    want = np.dtype(spec.dtype)
    if array.dtype == want and array.shape == spec.shape and array.flags.c_contiguous:
        return array
    got = f"input '{spec.name}': got {_short(array.dtype)}[{','.join(map(str, array.shape))}], "
    if array.dtype != want or array.shape != spec.shape:
        remedies = []
        if array.shape != spec.shape:
            remedies.append(_shape_hint(spec, array.shape))
        if array.dtype != want:
            remedies.append(f"convert with .astype(numpy.{want})")
        raise InputMismatch(f"{got}module expects {_short(want)}[{_dims(spec)}]; {' and '.join(remedies)}")
    raise InputMismatch(f"{got}which is not C-contiguous; pass numpy.ascontiguousarray(...) of it")


def _to_numpy(spec: TensorSpec, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    where = f"input '{spec.name}': got a {type(value).__name__}"
    if not hasattr(value, "__dlpack__"):
        raise InputMismatch(f"{where}; pass a NumPy array or a DLPack tensor")
    try:
        kind = value.__dlpack_device__()[0] if hasattr(value, "__dlpack_device__") else 1
        if kind != 1:
            raise InputMismatch(f"{where} that is not in CPU memory; move it to the CPU")
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        reason = str(e).strip().splitlines()
        raise InputMismatch(
            f"{where} that DLPack cannot hand over ({reason[0] if reason else e}); pass a NumPy array"
        ) from None


def _shape_hint(spec: TensorSpec, got: tuple[int, ...]) -> str:
    want = spec.shape
    if len(want) == len(got) == 4 and got == (want[0], want[2], want[3], want[1]):
        return "transpose to NCHW"
    if got == want[1:] and want[0] == 1:
        return "add the batch axis with x[None]"
    if len(got) == len(want) and got[1:] == want[1:]:
        return f"feed batches of {want[0]} or recompile with --batch {got[0]}"
    if len(got) == len(want):
        return f"resize it or recompile with --input-shape {spec.name}={','.join(map(str, got))}"
    return f"give it {len(want)} axes"


def describe(specs: Sequence[TensorSpec]) -> str:
    """``data: f32[1,3,224,224], ...`` for messages."""
    return ", ".join(f"{s.name}: {_short(np.dtype(s.dtype))}[{_dims(s)}]" for s in specs)


def _dims(spec: TensorSpec) -> str:
    return ",".join(map(str, spec.shape))


def _short(dtype: np.dtype) -> str:
    name = dtype.name
    stem = name.rstrip("0123456789")
    order = "" if dtype.isnative else "byte-swapped "
    return order + _SHORT.get(stem, stem) + name[len(stem) :]
