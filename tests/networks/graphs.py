"""Small ONNX networks for tests, and the comparison with ONNX Runtime."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from skimtvm.compiler import Compiled, CompileOptions, compile_model

TOLERANCE = 1e-5  # of the largest output; float32 sums of up to 1e4 terms differ by about 1e-6


class Net:
    """Builds a graph node by node: ``y = net.op("Relu", x)``; weights are seeded and scaled to keep activations near 1."""

    def __init__(self, *shape: Any, opset: int = 17, seed: int = 0) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
        self.channels: dict[str, int] = {"x": shape[1]}

    def const(self, array: Any) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        names = [f"{kind.lower()}{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{kind}_{len(self.nodes)}", **attrs))
        return names[0] if outputs == 1 else names

    def conv(
        self,
        x: str,
        c: int,
        k: int,
        kernel: int = 3,
        density: float = 1.0,
        groups: int = 1,
        bias: bool = True,
        **attrs: Any,
    ) -> str:
        w = self.rng.standard_normal((k, c // groups, kernel, kernel)) * (
            self.rng.random((k, c // groups, kernel, kernel)) < density
        )
        w *= 1.0 / np.sqrt(max(1.0, c // groups * kernel * kernel * density))
        names = [self.const(w.astype(np.float32))]
        if bias:
            names.append(self.const(self.rng.standard_normal(k).astype(np.float32) * 0.1))
        attrs.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, *names, group=groups, **attrs)

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model)
        shapes = {v.name: v for v in inferred.graph.value_info}
        del model.graph.output[:]
        for o in outputs:
            model.graph.output.append(shapes.get(o) or next(v for v in inferred.graph.output if v.name == o))
        return model


def run_compiled(compiled: Compiled, feeds: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    vm = relax.VirtualMachine(compiled.executable, tvm.cpu())
    out = vm["main"](*(tvm.runtime.tensor(feeds[s.name]) for s in compiled.manifest.inputs))
    return [out.numpy()] if hasattr(out, "numpy") else [o.numpy() for o in out]


def run_onnx(model: onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1  # its threads would spin on CPUs that other tests use
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def check(
    model: onnx.ModelProto, options: CompileOptions | None = None, seed: int = 1, tolerance: float = TOLERANCE
) -> Compiled:
    """Compile, run and compare every output with ONNX Runtime; returns the compiled module.
    Kernels are chosen by the built-in model, the same on every machine, unless ``options`` say otherwise."""
    options = options or CompileOptions()
    compiled = compile_model(model, dataclasses.replace(options, calibration=options.calibration or "none"))
    rng = np.random.default_rng(seed)
    feeds = {s.name: rng.standard_normal(s.shape).astype(s.dtype) for s in compiled.manifest.inputs}
    expected = run_onnx(model, feeds)
    got = run_compiled(compiled, feeds)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        scale = max(float(np.abs(e).max()), 1e-30)
        error = float(np.abs(g.astype(np.float64) - e).max()) / scale
        assert error <= tolerance, f"differs from ONNX Runtime by {error:.2e} of the largest output"
    return compiled
