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

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 1.0

    @property
    def sparse(self) -> bool:
        return "_csr_" in self.kernel or "_bsr_" in self.kernel

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
    tools: dict[str, str] = field(default_factory=dict)  # versions that decide the module's bytes, by name

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Manifest:
        raw = json.loads(text)
        raw["features"] = tuple(raw["features"])
        raw["calls"] = tuple(raw["calls"])
        raw["warnings"] = tuple(raw["warnings"])
        raw["layers"] = tuple(LayerRecord(**layer) for layer in raw["layers"])
        for key in ("inputs", "outputs"):
            raw[key] = tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in raw[key])
        return Manifest(**raw)
