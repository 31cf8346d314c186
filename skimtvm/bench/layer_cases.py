"""The single layers of the benchmark, as ONNX models of one convolution or fully-connected layer with bias and ReLU."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .. import winograd
from ..workload import ConvWorkload, DenseWorkload, WinogradWorkload
from .sparsity import Sparsity

REFERENCE = "SkimCaffe, built for AVX-512, Zen 4"


@dataclass(frozen=True)
class LayerCase:
    """``skimcaffe``: its row of the published measurement; a grouped layer was measured one group at a time there.
    ``base``: the case with stride 1 whose rate this one is compared with. ``sparsity``: share of zeros that belongs to
    the layer, whatever is asked for."""

    name: str
    workload: ConvWorkload | DenseWorkload
    skimcaffe: str = ""
    base: str = ""
    sparsity: float | None = None

    @property
    def direct(self) -> LayerCase:
        """What engines without Winograd layers run instead: the convolution of the same shape; others are themselves."""
        if not isinstance(self.workload, WinogradWorkload):
            return self
        shape = {f.name: getattr(self.workload, f.name) for f in fields(ConvWorkload)}
        return replace(self, workload=ConvWorkload(**shape))

    def at(self, batch: int) -> LayerCase:
        """The same layer for ``batch`` images; fully connected ones have rows of their own."""
        if not isinstance(self.workload, ConvWorkload):
            return self
        return replace(self, workload=replace(self.workload, n=batch))

    def pruned(self, asked: Sparsity) -> Sparsity:
        """How this layer is pruned when ``asked`` is."""
        if self.sparsity is None or asked.kind != "uniform":
            return asked
        return Sparsity("uniform", self.sparsity)


def _conv(
    c: int,
    k: int,
    size: int,
    kernel: int | tuple[int, int],
    *,
    pads: tuple[int, int, int, int] | None = None,
    **more: Any,
) -> ConvWorkload:
    """Square image; padding that keeps the size unless given."""
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dh, dw = more.get("dilation", (1, 1))
    same = ((kh - 1) // 2 * dh, (kw - 1) // 2 * dw)
    return ConvWorkload(1, c, size, size, k, kh, kw, padding=pads or (*same, *same), **more)


def _fc(out: int, inner: int, batch: int) -> DenseWorkload:
    return DenseWorkload(batch, inner, out)


def _native(base: str, c: int, size: int) -> LayerCase:
    """A native Winograd layer F(4x4,3x3) of the shape of the case ``base``."""
    workload = WinogradWorkload(1, c, size, size, c, 3, 3, padding=(1, 1, 1, 1), m=4)
    return LayerCase(f"winograd4_{c}_{c}_{size}", workload, base=base)


_TWO = (2, 2)
_BASE28 = "3x3_128_128_28"
_BASE14 = "3x3_256_256_14"
CASES = (
    LayerCase("3x3_64_64_56", _conv(64, 64, 56, 3), "3x3_64_64_56"),
    LayerCase(_BASE28, _conv(128, 128, 28, 3), _BASE28),
    LayerCase(_BASE14, _conv(256, 256, 14, 3), _BASE14),
    LayerCase("3x3_512_512_7", _conv(512, 512, 7, 3), "3x3_512_512_7"),
    LayerCase("1x1_64_256_56", _conv(64, 256, 56, 1)),
    LayerCase("1x1_256_64_56", _conv(256, 64, 56, 1)),
    LayerCase("1x1_128_512_28", _conv(128, 512, 28, 1)),
    LayerCase("1x1_256_1024_14", _conv(256, 1024, 14, 1)),
    LayerCase("1x1_1024_256_14", _conv(1024, 256, 14, 1)),
    LayerCase("1x1_512_2048_7", _conv(512, 2048, 7, 1)),
    LayerCase("alexnet_conv2", _conv(96, 256, 27, 5, groups=2), "alexnet_conv2_g"),
    LayerCase("alexnet_conv3", _conv(256, 384, 13, 3), "alexnet_conv3"),
    LayerCase("alexnet_conv4", _conv(384, 384, 13, 3, groups=2)),
    LayerCase("alexnet_conv5", _conv(384, 256, 13, 3, groups=2), "alexnet_conv5_g"),
    LayerCase("googlenet_3a_3x3", _conv(96, 128, 28, 3), "googlenet_3a_3x3"),
    LayerCase("googlenet_3a_5x5", _conv(16, 32, 28, 5), "googlenet_3a_5x5"),
    LayerCase("googlenet_4e_3x3", _conv(160, 320, 14, 3), "googlenet_4e_3x3"),
    LayerCase("googlenet_5b_3x3", _conv(192, 384, 7, 3), "googlenet_5b_3x3"),
    LayerCase("googlenet_5b_5x5", _conv(48, 128, 7, 5), "googlenet_5b_5x5"),
    LayerCase("3x3_s2_128_128_56", _conv(128, 128, 56, 3, strides=_TWO), base=_BASE28),
    LayerCase("3x3_s2_256_256_28", _conv(256, 256, 28, 3, strides=_TWO), base=_BASE14),
    LayerCase("1x1_s2_256_512_56", _conv(256, 512, 56, 1, strides=_TWO), base="1x1_128_512_28"),
    LayerCase("3x3_s21_128_128_56", _conv(128, 128, 56, 3, strides=(2, 1)), base=_BASE28),
    LayerCase("3x3_s2_tfpad_128_128_56", _conv(128, 128, 56, 3, strides=_TWO, pads=(0, 0, 1, 1)), base=_BASE28),
    LayerCase("3x3_g4_256_256_28", _conv(256, 256, 28, 3, groups=4), base=_BASE28),
    LayerCase("3x3_g32_256_256_14", _conv(256, 256, 14, 3, groups=32), base=_BASE14),
    LayerCase("3x3_d2_128_128_28", _conv(128, 128, 28, 3, dilation=_TWO), base=_BASE28),
    LayerCase("1x7_192_192_17", _conv(192, 192, 17, (1, 7)), base=_BASE14),
    LayerCase("7x1_192_192_17", _conv(192, 192, 17, (7, 1)), base=_BASE14),
    LayerCase("3x3_pads_128_128_28", _conv(128, 128, 28, 3, pads=(2, 0, 0, 2)), base=_BASE28),
    _native("3x3_64_64_56", 64, 56),
    _native(_BASE28, 128, 28),
    _native(_BASE14, 256, 14),
    *(LayerCase(f"fc6_b{n}", _fc(4096, 9216, n), "fc6_4096x9216", sparsity=0.9028) for n in (1, 16, 256)),
    *(LayerCase(f"fc7_b{n}", _fc(4096, 4096, n), "fc7_4096x4096", sparsity=0.8437) for n in (1, 16, 256)),
)


def build(case: LayerCase, sparsity: Sparsity, *, seed: int = 0) -> Any:
    """The layer as onnx.ModelProto: seeded normal weights, pruned; bias; ReLU. The node is called like the case.
    The weights of a native Winograd layer are pruned before each position gets the scale of its effect."""
    wl, rng = case.workload, np.random.default_rng(seed)
    if isinstance(wl, ConvWorkload):
        shape: tuple[int, ...] = wl.weight_shape
        x, y, fan_in = (wl.n, wl.c, wl.h, wl.w), wl.out_shape, wl.row_length
        attributes: dict[str, Any] = {
            "strides": wl.strides,
            "pads": wl.padding,
            "dilations": wl.dilation,
            "group": wl.groups,
            "kernel_shape": (wl.kh, wl.kw),
        }
        op, groups = "Conv", wl.groups
    else:
        shape, fan_in, op, groups = (wl.n, wl.k), wl.k, "Gemm", 1
        x, y = (wl.m, wl.k), (wl.m, wl.n)  # type: ignore[assignment]
        attributes = {"transB": 1}
    weight = rng.standard_normal(shape, dtype=np.float32) * np.float32(fan_in**-0.5)
    tensors = {"w": sparsity.prune(weight, groups), "b": rng.standard_normal(shape[0], dtype=np.float32)}
    if isinstance(wl, WinogradWorkload):
        f = winograd.transform(wl.m, wl.kh)
        tensors["w"] = (tensors["w"] * (wl.m * wl.kh / f.tile / f.effect)).astype(np.float32)
        layer = winograd.function_node(wl.m, wl.kh, ["x", "w", "b"], "z", wl.padding, case.name)
    else:
        layer = helper.make_node(op, ["x", "w", "b"], ["z"], name=case.name, **attributes)
    graph = helper.make_graph(
        [
            layer,
            helper.make_node("Relu", ["z"], ["y"], name="relu"),
        ],
        case.name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if isinstance(wl, WinogradWorkload):
        winograd.add_function(model, wl.m, wl.kh)
    return model


@cache
def _reference() -> dict[tuple[str, float, int], float]:
    raw = json.loads((Path(__file__).parent.parent / "data" / "skimcaffe_kernels.json").read_text())
    return {(r["layer"], r["sparsity"], r["batch"]): r["frac_peak"] for r in raw["rows"]}


def skimcaffe_share(case: LayerCase, sparsity: Sparsity) -> float | None:
    """SkimCaffe's share of the practical peak on this layer, where it was measured at the same unstructured sparsity."""
    batch = case.workload.m if isinstance(case.workload, DenseWorkload) else case.workload.n
    return _reference().get((case.skimcaffe, sparsity.share, batch)) if sparsity.kind == "uniform" else None
