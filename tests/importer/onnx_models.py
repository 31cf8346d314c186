"""Models and comparisons that the import tests share."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import helper as h
from onnx import numpy_helper as nh

from skimtvm import importer

RNG = np.random.default_rng(0)


def f32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model(nodes, inputs, outputs, init=None, opset=17, *, domains=(), dtype=TP.FLOAT, functions=(), ir=8):
    """``inputs``/``outputs``: {name: shape or None}, ``init``: {name: array}."""
    graph = h.make_graph(
        nodes,
        "g",
        [v if isinstance(v, onnx.ValueInfoProto) else h.make_tensor_value_info(k, dtype, v) for k, v in inputs.items()],
        [h.make_tensor_value_info(k, dtype, v) for k, v in outputs.items()],
        [nh.from_array(v, k) for k, v in (init or {}).items()],
    )
    imports = [h.make_opsetid("", opset), *(h.make_opsetid(d, 1) for d in domains)]
    return h.make_model(graph, opset_imports=imports, ir_version=ir, functions=list(functions))


def cnn(opset=13, batch=1, **kw):
    init = {"w1": f32(8, 3, 3, 3), "b1": f32(8), "g": f32(8), "be": f32(8), "mu": f32(8), "va": np.abs(f32(8)) + 1,
            "w2": f32(8, 8, 1, 1), "fw": f32(10, 8), "fb": f32(10)}  # fmt: skip
    nodes = [
        h.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv_a", pads=[1] * 4),
        h.make_node("BatchNormalization", ["c1", "g", "be", "mu", "va"], ["n1"]),
        h.make_node("Relu", ["n1"], ["r1"]),
        h.make_node("Dropout", ["r1"], ["d1"]),
        h.make_node("Conv", ["d1", "w2"], ["c2"]),
        h.make_node("Sum", ["c2", "r1"], ["a"]),
        h.make_node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        h.make_node("GlobalAveragePool", ["p"], ["q"]),
        h.make_node("Flatten", ["q"], ["fl"]),
        h.make_node("Gemm", ["fl", "fw", "fb"], ["y"], name="fc", transB=1),
    ]
    return model(nodes, {"x": [batch, 3, 8, 8]}, {"y": [batch, 10]}, init, opset, **kw)


def one_conv(weight_nodes=(), *, init, inputs=None, x="x", w="w", **kw):
    nodes = [*weight_nodes, h.make_node("Conv", [x, w], ["y"], name="conv")]
    return model(nodes, inputs or {"x": [1, 3, 8, 8]}, {"y": None}, init, **kw)


def run_tvm(imported, feeds):
    import tvm
    from tvm import relax

    vm = relax.VirtualMachine(tvm.compile(imported.mod, target="llvm"), tvm.cpu())
    result = vm["main"](*(tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs))
    return [result.numpy()] if len(imported.outputs) == 1 else [r.numpy() for r in result]


def run_ort(proto, feeds):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(proto.SerializeToString()).run(None, feeds)


def same_numbers(proto, imported=None, feeds=None, tol=1e-4):
    imported = imported or importer.load_model(proto)
    feeds = feeds or {s.name: f32(*s.shape) for s in imported.inputs}
    for got, want in zip(run_tvm(imported, feeds), run_ort(proto, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def one_line(err, *parts):
    text = str(err.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


def anchors(mod):
    from skimtvm.onnx_to_relax import is_anchor

    return [b.value for b in mod["main"].body.blocks[0].bindings if is_anchor(b.value)]


def ops(proto_or_prepared):
    return [n.op_type for n in getattr(proto_or_prepared, "model", proto_or_prepared).graph.node]


W = f32(4, 3, 3, 3)
