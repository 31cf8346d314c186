"""Small ONNX graphs to prune, and ONNX Runtime to compare before and after."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from skimtvm.prune import oneshot

ort = pytest.importorskip("onnxruntime")


def run(model, x=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    if x is None:
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        x = np.random.default_rng(0).standard_normal(shape).astype("f")
    return session.run(None, {value.name: x})[0]


def make(nodes, tensors, shape=("N", 3, 12, 12), **options):
    graph = helper.make_graph(
        [helper.make_node(op, i, o, **a) for op, i, o, a in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1][2][0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype("f") if a.dtype == np.float64 else a, n) for n, a in tensors.items()],
    )
    graph.output[0].type.tensor_type.shape.SetInParent()
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **options)


def chain(middle=(), pads=(1, 1, 1, 1), bias=True, seed=0):
    """conv1 -> middle -> conv2 -> relu -> conv3, and the tensors to play with."""
    rng = np.random.default_rng(seed)
    t = {
        "w1": rng.standard_normal((8, 3, 3, 3)),
        "w2": rng.standard_normal((6, 8, 3, 3)),
        "w3": rng.standard_normal((4, 6, 1, 1)),
    }
    t |= {"b1": rng.standard_normal(8), "b2": rng.standard_normal(6), "b3": rng.standard_normal(4)}
    nodes = [("Conv", ["x", "w1", *(["b1"] if bias else [])], ["v0"], {"name": "conv1", "pads": [1] * 4})]
    value = "v0"
    for i, (op, extra, attributes) in enumerate(middle):
        nodes.append((op, [value, *extra], [f"v{i + 1}"], attributes))
        value = f"v{i + 1}"
    nodes.append(("Conv", [value, "w2", "b2"], ["c2"], {"name": "conv2", "pads": list(pads)}))
    nodes += [("Relu", ["c2"], ["r2"], {}), ("Conv", ["r2", "w3", "b3"], ["y"], {"name": "conv3"})]
    return nodes, t


def only_dead(nodes, tensors, **options):
    """The model before and after removal of dead channels alone."""
    used = {i for n in nodes for i in n[1]}
    model = make(nodes, {k: v for k, v in tensors.items() if k in used}, **options)
    after, report = oneshot.prune_model(model, sparsity=0.0)
    onnx.checker.check_model(after)
    want, got = run(model), run(after)
    assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()
    return after, report.channels
