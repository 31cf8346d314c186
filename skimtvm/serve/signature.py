"""What a served model takes and gives, in the terms of the protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedModel
from ..report import TensorSpec

# NumPy name -> KServe datatype. BYTES and BF16 have no NumPy dtype of fixed size.
DATATYPES = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_ALIGNMENT = 4096  # bytes; also keeps the tensors of a slot on pages of their own


@dataclass(frozen=True)
class Signature:
    """Name and tensors of a model. The specs have the shape of the largest batch.

    ``row_axis``: the first axis of every tensor counts independent rows, so that requests can share a batch and a
    smaller request can be padded. ``batches``: the batch sizes that can be run, ascending; (1,) without row axis, where
    a request is one unit of fixed shape.
    """

    name: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[int, ...]
    row_axis: bool

    def __post_init__(self) -> None:
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype not in DATATYPES:
                raise UnsupportedModel(
                    f"tensor '{spec.name}' is {spec.dtype}, which the server's protocol cannot carry"
                )

    @property
    def capacity(self) -> int:
        """Rows of the largest batch."""
        return self.batches[-1]

    def batch_for(self, rows: int) -> int:
        """The smallest batch that holds ``rows`` rows."""
        return next(b for b in self.batches if b >= rows)

    def shape(self, spec: TensorSpec, rows: int) -> tuple[int, ...]:
        return (rows, *spec.shape[1:]) if self.row_axis else spec.shape

    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata; a free dimension is -1."""

        def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": s.name, "datatype": DATATYPES[s.dtype], "shape": list(self.shape(s, -1))} for s in specs]

        return {
            "name": self.name,
            "versions": ["1"],
            "platform": self.platform,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
        }

    def default_request_limit(self) -> int:
        """Bytes that a request of the largest batch needs as JSON: 32 for each number, and a margin for the rest."""
        return (1 << 16) + sum(32 * math.prod(s.shape) for s in self.inputs)

    def to_json(self) -> dict[str, Any]:
        def specs(items: tuple[TensorSpec, ...]) -> list[list[Any]]:
            return [[s.name, list(s.shape), s.dtype] for s in items]

        return {
            "name": self.name,
            "platform": self.platform,
            "inputs": specs(self.inputs),
            "outputs": specs(self.outputs),
            "batches": list(self.batches),
            "row_axis": self.row_axis,
        }

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Signature:
        def specs(items: list[Any]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in items)

        inputs, outputs = specs(raw["inputs"]), specs(raw["outputs"])
        return Signature(raw["name"], raw["platform"], inputs, outputs, tuple(raw["batches"]), raw["row_axis"])


class Slot:
    """One batch in shared memory: NumPy views of its inputs and outputs, for each batch size.

    ``memory``: writable buffer of at least ``slot_bytes(signature)`` bytes that starts at a page.
    """

    def __init__(self, signature: Signature, memory: memoryview) -> None:
        self.signature = signature
        self._views: list[np.ndarray] = []
        offset = 0
        for spec in (*signature.inputs, *signature.outputs):
            dtype = np.dtype(spec.dtype)
            count = math.prod(spec.shape)
            self._views.append(np.frombuffer(memory, dtype, count, offset).reshape(spec.shape))
            offset += _padded(count * dtype.itemsize)

    def inputs(self, batch: int) -> list[np.ndarray]:
        return self._first(self._views[: len(self.signature.inputs)], batch)

    def outputs(self, batch: int) -> list[np.ndarray]:
        return self._first(self._views[len(self.signature.inputs) :], batch)

    def _first(self, views: list[np.ndarray], batch: int) -> list[np.ndarray]:
        return [v[:batch] for v in views] if self.signature.row_axis else views


def slot_bytes(signature: Signature) -> int:
    """Bytes of one Slot, a multiple of the page size."""
    specs = (*signature.inputs, *signature.outputs)
    return max(sum(_padded(math.prod(s.shape) * np.dtype(s.dtype).itemsize) for s in specs), _ALIGNMENT)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
