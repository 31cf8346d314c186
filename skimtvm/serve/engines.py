"""What runs a model in a worker: a compiled module, or an ONNX Runtime session to compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..errors import EnvironmentProblem, InvalidModel, InvalidOption, UnsupportedModel
from ..report import TensorSpec
from .signature import Signature

Arrays = Mapping[str, np.ndarray]
NAMES = ("skimtvm", "onnxruntime")
_TOLERANCE = 1e-4  # of the largest value: a kernel may sum in another order at another place in the batch


class Engine(Protocol):
    """A loaded model. The specs have the shape of the largest of ``batches``, the batch sizes that it can run, as far as
    the first axis is a batch at all: that is found out by trying."""

    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[int, ...]

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name; the feeds are C-contiguous and of exactly the right shapes."""


class SkimEngine:
    """A module that ``skimtvm compile`` wrote."""

    platform = "skimtvm"

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        from ..runtime import load

        self._module = load(path, threads=threads)
        self.inputs, self.outputs = self._module.inputs, self._module.outputs
        sizes: tuple[int, ...] = self._module.batches
        # A module of several sizes runs any number of rows up to the largest, in the sizes that it finds best.
        one = (first_dimension(self.inputs, self.outputs),)
        self.batches: tuple[int, ...] = tuple(range(1, sizes[-1] + 1)) if sizes else one

    def run(self, feeds: Arrays) -> Arrays:
        return self._module.run(feeds)


class OnnxRuntimeEngine:
    """An ONNX file of fixed shapes on ONNX Runtime's CPU provider."""

    platform = "onnxruntime_onnx"

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EnvironmentProblem("--engine onnxruntime needs onnxruntime; pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads let go when a run ends
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # its exception classes share no public base
            raise InvalidModel(f"ONNX Runtime cannot load '{os.fspath(path)}': {str(e).splitlines()[0]}") from None
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self.batches: tuple[int, ...] = (first_dimension(self.inputs, self.outputs),)

    def run(self, feeds: Arrays) -> Arrays:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


def open_engine(name: str, path: str | os.PathLike[str], threads: int) -> Engine:
    """The engine ``name`` with the model ``path`` loaded. Raises a SkimError."""
    if name not in NAMES:
        raise InvalidOption(f"engine '{name}' is unknown; choose from {', '.join(NAMES)}")
    return SkimEngine(path, threads) if name == "skimtvm" else OnnxRuntimeEngine(path, threads)


def _spec(value: object) -> TensorSpec:
    name, shape, kind = value.name, value.shape, value.type  # type: ignore[attr-defined]
    if not all(isinstance(d, int) for d in shape):
        raise UnsupportedModel(f"tensor '{name}' has free dimensions {shape}; give a model of fixed shapes")
    dtype = kind.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(name, tuple(shape), {"float": "float32", "double": "float64"}.get(dtype, dtype))


def first_dimension(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> int:
    """The first dimension that all tensors share, or 1."""
    first = {s.shape[0] if s.shape else 1 for s in (*inputs, *outputs)}
    return first.pop() if len(first) == 1 and inputs else 1


def describe(engine: Engine, name: str) -> tuple[Signature, str | None]:
    """The signature under which ``engine`` is served, and why requests cannot share its batch, if they cannot.

    The smallest and the largest batch are run, which also warms the engine up.
    """
    reason = None
    for batch in sorted({engine.batches[0], engine.batches[-1]}):
        rng = np.random.default_rng(batch)
        feeds = {s.name: _sample(s, _resized(s, batch, engine), rng) for s in engine.inputs}
        if batch == 1:
            engine.run(feeds)
        elif reason is None:
            reason = _dependence(engine.run, feeds)
    row_axis = engine.batches != (1,) and reason is None
    batches = engine.batches if row_axis else (1,)
    return Signature(name, engine.platform, engine.inputs, engine.outputs, batches, row_axis), reason


def _resized(spec: TensorSpec, batch: int, engine: Engine) -> tuple[int, ...]:
    return (batch, *spec.shape[1:]) if engine.batches != (1,) else spec.shape


def _dependence(run: Callable[[Arrays], Arrays], feeds: Arrays) -> str | None:
    """Why the rows of a batch are not independent of each other and of their place, or None if they are.

    The batch runs once more with its rows in reverse order, every second one zero: what is left must come out the same.
    """
    # Copies: an output may be a view of the engine's memory.
    first = {name: np.array(array) for name, array in run(feeds).items()}
    kept = slice(0, None, 2)
    again = run({name: _reversed_with_gaps(array, kept) for name, array in feeds.items()})
    for name, before in first.items():
        want, got = before[::-1][kept], again[name][kept]
        scale = float(np.abs(want.astype(np.float64)).max(initial=0))
        if not np.allclose(got, want, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
            return f"output '{name}' of a row depends on the other rows of its batch or on its place in it"
    return None


def _reversed_with_gaps(array: np.ndarray, kept: slice) -> np.ndarray:
    other = np.zeros_like(array)
    other[kept] = array[::-1][kept]
    return other


def _sample(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values that most networks take: normal floats, and 0 or 1 for whole numbers, which may be indices."""
    if np.dtype(spec.dtype).kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)
