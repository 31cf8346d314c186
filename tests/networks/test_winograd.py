"""Winograd layers in networks: native weights through the ONNX function, and spatial weights within the tolerance."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from skimtvm import pipeline, winograd
from skimtvm.compiler import CompileOptions
from skimtvm.importer import prepare_onnx
from skimtvm.relay_passes import bands
from skimtvm.relay_passes.split_batch import Cut
from skimtvm.target import resolve

from .graphs import Net, check

LOOSE = 1e-4  # ONNX Runtime computes the function in float32 too: both sides carry F(4x4)'s rounding


class WinogradNet(Net):
    sizes: set[tuple[int, int]]

    def native(self, x: str, c: int, k: int, m: int = 4, r: int = 3, density: float = 0.1, **attrs: Any) -> str:
        self.__dict__.setdefault("sizes", set()).add((m, r))
        f = winograd.transform(m, r)
        u = f.forward(self.rng.standard_normal((k, c, r, r)) / np.sqrt(c * r * r * density))
        u *= self.rng.random(u.shape) < density
        inputs = [x, self.const(u.astype(np.float32)), self.const(self.rng.standard_normal(k).astype(np.float32) * 0.1)]
        attrs.setdefault("pads", [r // 2] * 4)
        return self.op(f.name, *inputs, domain=winograd.DOMAIN, **attrs)

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, [None] * 4) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        for m, r in sorted(self.__dict__.get("sizes", ())):
            winograd.add_function(model, m, r)
        onnx.checker.check_model(model)
        return model


def kernels(compiled: Any) -> dict[str, str]:
    return {layer.name: layer.kernel for layer in compiled.manifest.layers if layer.macs}


@pytest.mark.parametrize("batch", [1, 3])
def test_native_layers_run_sparse(batch: int) -> None:
    net = WinogradNet(batch, 8, 14, 14)
    y = net.op("Relu", net.native("x", 8, 16))
    y = net.op("Relu", net.op("Add", net.native(y, 16, 16, m=2, pads=[0, 1, 2, 1]), y))  # a residual
    y = net.op("Concat", net.native(y, 16, 8, r=5), net.op("Relu", net.conv(y, 16, 8, 1)), axis=1)
    compiled = check(net.model(y), tolerance=LOOSE)
    names = [name for layer, name in kernels(compiled).items() if layer.startswith("Winograd")]
    assert len(names) == 3 and all("_csr_winograd" in name for name in names)
    record = next(layer for layer in compiled.manifest.layers if "winograd2" in layer.kernel)
    assert record.weights == 16 * 16 * 16 and 0.05 < record.density < 0.15 and record.sparse


QUICK = {(27, 16), (7, 3), (1, 1)}
SHAPES = [
    pytest.param(size, batch, marks=() if (size, batch) in QUICK else pytest.mark.slow)
    for size in (56, 28, 27, 14, 13, 7, 5, 1)
    for batch in (1, 3, 16)
]


@pytest.mark.parametrize(("size", "batch"), SHAPES)
def test_shapes_batches_and_densities(size: int, batch: int) -> None:
    """Each output is one native layer, from no weights at all to all of them."""
    net = WinogradNet(batch, 8, size, size)
    densities = (1e-9, 0.02, 0.1, 0.5, 1.0)
    compiled = check(net.model(*(net.native("x", 8, 12, density=d) for d in densities)), tolerance=LOOSE)
    records = [r for r in compiled.manifest.layers if r.macs]
    assert [r.nnz for r in records] == sorted(r.nnz for r in records) and records[0].nnz == 0
    assert all("winograd4" in r.kernel for r in records)


def test_scales_fold_into_native_weights() -> None:
    net = WinogradNet(1, 8, 13, 13)
    stats = [net.const(net.rng.uniform(0.5, 2, 16).astype(np.float32)) for _ in range(4)]
    y = net.op("Relu", net.op("BatchNormalization", net.native("x", 8, 16), *stats))
    y = net.native(net.op("Mul", y, net.const(np.float32(3))), 16, 8, density=1.0)
    compiled = check(net.model(y), tolerance=LOOSE)
    assert all("winograd4" in kernel for kernel in kernels(compiled).values())


def test_a_function_of_that_name_with_another_body_is_inlined() -> None:
    net = WinogradNet(1, 4, 8, 8)
    model = net.model(net.native("x", 4, 4))
    assert list(prepare_onnx(model, keep_winograd=True).winograd.values()) == [(4, 3)]
    body = model.functions[0].node
    add = body[-1]
    add.output[0] = "sum"
    body.append(helper.make_node("Neg", ["sum"], ["Y"]))
    assert not prepare_onnx(model, keep_winograd=True).winograd
    assert not any("winograd" in kernel for kernel in kernels(check(model, tolerance=LOOSE)).values())


def test_tolerance_decides_about_spatial_weights() -> None:
    net = Net(1, 32, 14, 14)
    model = net.model(net.op("Relu", net.conv("x", 32, 32)))
    by_tolerance = {}
    for tolerance in (1e-4, 1e-6, 1e-9):
        compiled = check(model, CompileOptions(tolerance=tolerance))
        record = next(layer for layer in compiled.manifest.layers if layer.macs)
        by_tolerance[tolerance] = record
    assert "winograd4" in by_tolerance[1e-4].kernel
    assert "winograd2" in by_tolerance[1e-6].kernel and "winograd4 would add" in by_tolerance[1e-6].reason
    assert "_dense_conv2d_" in by_tolerance[1e-9].kernel and "more than 1e-09" in by_tolerance[1e-9].reason


def test_long_activations_stay_outside() -> None:
    net = WinogradNet(1, 32, 14, 14)
    y = net.op("Sigmoid", net.native("x", 32, 32))
    compiled = check(net.model(net.op("Sigmoid", net.conv(y, 32, 32))), tolerance=LOOSE)
    native, spatial = (layer for layer in compiled.manifest.layers if layer.macs)
    assert "winograd4" in native.kernel and native.epilogue == "add"
    assert "winograd" not in spatial.kernel and spatial.epilogue == "add+sigmoid"


def test_forced_kernels_and_batches() -> None:
    net = Net(2, 16, 9, 9)
    y = net.conv("x", 16, 16, density=0.3, pads=[0, 2, 1, 0])
    model = net.model(net.op("Relu", y))
    for kernel in ("winograd4", "winograd2", "csr"):
        compiled = check(model, CompileOptions(force=(("Conv_0", kernel),)))
        assert kernel in kernels(compiled)["Conv_0"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "attrs"),
    [
        (7, {"strides": [2, 2], "pads": [3, 3, 3, 3]}),
        (11, {"strides": [4, 4], "pads": [2, 1, 1, 3]}),
        (5, {"strides": [2, 2], "pads": [2, 1, 2, 1], "groups": 2}),
    ],
)
def test_strided_convolutions_by_their_phases(kernel: int, attrs: dict[str, Any], batch: int) -> None:
    net = Net(batch, 4, 39, 36)
    first = net.op("Relu", net.conv("x", 4, 16, kernel, **attrs))
    model = net.model(net.op("MaxPool", first, kernel_shape=[3, 3], strides=[2, 2]))
    compiled = check(model, CompileOptions(force=(("Conv_0", "winograd4"),)))
    record = next(layer for layer in compiled.manifest.layers if layer.macs)
    assert "winograd4" in record.kernel and record.weights == 16 * 4 // attrs.get("groups", 1) * kernel**2
    assert any(layer.op == "split_phases" for layer in compiled.manifest.layers)


def test_a_dense_first_layer_takes_winograd_by_itself() -> None:
    net = Net(1, 3, 112, 112)
    compiled = check(net.model(net.op("Relu", net.conv("x", 3, 64, 7, strides=[2, 2], pads=[3] * 4))))
    assert "dense_winograd4" in kernels(compiled)["Conv_0"]
    small = Net(1, 16, 28, 28)  # a 3x3 of stride 2 has phases of 2x2: nothing to gain
    compiled = check(small.model(small.op("Relu", small.conv("x", 16, 32, 3, strides=[2, 2]))))
    assert "winograd" not in kernels(compiled)["Conv_0"]


def test_interleaved_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and spatial weights, a strided layer in phases, a residual, a layer without padding below, planes of 13x13 and
    7x7, band by band in windows."""
    images = resolve("auto").lanes
    monkeypatch.setattr(pipeline, "find_cut", lambda *a: Cut(0, images, "test"))
    monkeypatch.setattr(bands, "BAND", 1 / 256)
    net = WinogradNet(images, 3, 26, 26)
    x = net.op("Relu", net.conv("x", 3, 8, 7, strides=[2, 2], pads=[3] * 4))
    y = net.op("Relu", net.native(x, 8, 8))
    y = net.op("Relu", net.op("Add", net.native(y, 8, 8, m=2), x))
    y = net.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.native(net.conv(y, 8, 12, 1, pads=[0] * 4, density=0.3), 12, 4, pads=[1, 1, 0, 0])
    stem = net.nodes[0].name
    compiled = check(net.model(y), CompileOptions(force=((stem, "winograd4"),)), tolerance=LOOSE)
    layers = {i: layer for i, layer in enumerate(compiled.manifest.layers) if layer.macs}
    calls = Counter(compiled.manifest.calls)
    bands_of = [calls[i] for i, layer in layers.items() if "winograd" in layer.kernel]
    assert len(bands_of) == 4 and min(bands_of) > 1
    assert all(layer.workload.startswith(f"{images}x") for layer in layers.values())


def test_compile_explains_the_choice(tmp_path: Path) -> None:
    net = WinogradNet(1, 32, 14, 14)
    onnx.save(net.model(net.op("Relu", net.native(net.conv("x", 32, 32), 32, 32))), tmp_path / "m.onnx")
    command = [sys.executable, "-m", "skimtvm", "compile", "m.onnx", "-o", "m.so", "--explain"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "f32_csr_winograd4_conv2d" in done.stdout and "f32_dense_winograd4_conv2d" in done.stdout
    refused = subprocess.run([*command, "--tolerance", "0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
