"""What the compiler decided about each layer, and why: the records behind ``--explain``, the manifest and the profile."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a compiled network.

    ``macs``: multiply-adds of the dense layer for the whole batch; ``nnz``: nonzero weights; ``weights``: all weights;
    ``stored_bytes``: bytes of the weights as they are stored in the module, index arrays included.
    """

    name: str  # ONNX node name, or its first output where the node has none
    op: str  # conv2d, depthwise_conv2d, dense, max_pool2d, elementwise, ...
    workload: str  # readable shape, e.g. "1x64x56x56 * 64x64x3x3 s1 p1"
    kernel: str = ""  # e.g. f32_csr_conv2d_1x7_avx512
    reason: str = ""  # why this kernel, or why the layer is not sparse
    macs: int = 0
    nnz: int = 0
    weights: int = 0
    stored_bytes: int = 0
    epilogue: str = ""  # fused operators, e.g. "bias+add+relu"
    symbol: str = ""  # function in the module
    knobs: str = ""  # the tuning record that its knobs come from; empty: the default knobs

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 1.0

    @property
    def sparse(self) -> bool:
        return any(f"_{name}_" in self.kernel for name in ("csr", "bsr", "sell"))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> LayerRecord:
        return LayerRecord(**json.loads(text))


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and NumPy dtype name of a network input or output, as the user knows it (ONNX names)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def with_batch(self, batch: int) -> TensorSpec:
        """The same with another first dimension."""
        return dataclasses.replace(self, shape=(batch, *self.shape[1:]))


@dataclass(frozen=True)
class Variant:
    """The network at one more batch size: ``layers`` and ``calls`` as in the manifest."""

    batch: int
    layers: tuple[LayerRecord, ...]
    calls: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What travels in a compiled module. ``calls``: index into ``layers`` of each kernel call, in execution order
    (several calls may serve one layer, and a call that serves no layer of the network has its own record). The same
    model file, options, target and tools give the same module, byte by byte."""

    skimtvm_version: str
    tvm_version: str
    target: str  # LLVM CPU name, e.g. znver4
    features: tuple[str, ...]  # x86 features that the code needs, in /proc/cpuinfo spelling
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerRecord, ...]
    calls: tuple[int, ...]
    model_sha256: str
    model_name: str
    options: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    # A module that holds several batch sizes: all of them, ascending; the estimated seconds of a run of each; and what
    # differs from the rest of the manifest, which describes the largest, at each of the others.
    batches: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    variants: tuple[Variant, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)  # versions that decide the module's bytes, by name
    choice: str = ""  # what the kernels were chosen by: a measured table, or the built-in model

    def at(self, batch: int) -> Manifest:
        """The manifest as that of a module for ``batch`` alone, which must be one of ``batches``."""
        one = dataclasses.replace(self, batches=(), seconds=(), variants=())
        for v in self.variants:
            if v.batch == batch:
                inputs, outputs = ([s.with_batch(batch) for s in specs] for specs in (self.inputs, self.outputs))
                one = dataclasses.replace(
                    one, layers=v.layers, calls=v.calls, inputs=tuple(inputs), outputs=tuple(outputs)
                )
        return one

    def function(self, batch: int | None = None) -> str:
        """Name in the module of the function that runs ``batch`` images (None: the only or the largest batch)."""
        return "main" if batch is None or not self.batches or batch == self.batches[-1] else f"main_{batch}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Manifest:
        raw = json.loads(text)
        raw["features"] = tuple(raw["features"])
        raw["calls"] = tuple(raw["calls"])
        raw["warnings"] = tuple(raw["warnings"])
        raw["layers"] = tuple(LayerRecord(**layer) for layer in raw["layers"])
        raw["batches"], raw["seconds"] = tuple(raw.get("batches", ())), tuple(raw.get("seconds", ()))
        raw["variants"] = tuple(
            Variant(v["batch"], tuple(LayerRecord(**layer) for layer in v["layers"]), tuple(v["calls"]))
            for v in raw.get("variants", ())
        )
        for key in ("inputs", "outputs"):
            raw[key] = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in raw[key])
        return Manifest(**raw)
