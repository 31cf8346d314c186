"""Norms that exporters spelled out become one operator, and only those."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import helper, numpy_helper

import skimtvm
from skimtvm.importer import load_model
from skimtvm.relay_passes import simplify_passes
from skimtvm.relay_passes._utils import Graph

WIDTH, TOKENS = 24, 12
SPELLINGS = {
    "torch": """
        m = ReduceMean(x) axes=-1
        d = Sub(x, m)
        q = Pow(d, two)
        v = ReduceMean(q) axes=-1
        e = Add(v, eps)
        s = Sqrt(e)
        n = Div(d, s)
        g = Mul(n, gamma)
        y = Add(g, beta)""",
    "tensorflow": """
        m = ReduceMean(x) axes=-1
        d = Sub(x, m)
        q = Mul(d, d)
        v = ReduceMean(q) axes=-1
        e = Add(v, eps)
        s = Sqrt(e)
        r = Reciprocal(s)
        k = Mul(r, gamma)
        xk = Mul(x, k)
        mk = Mul(m, k)
        b = Sub(beta, mk)
        y = Add(xk, b)""",
    "rms": """
        q = Pow(x, two)
        v = ReduceMean(q) axes=-1
        e = Add(v, eps)
        s = Sqrt(e)
        r = Div(one, s)
        n = Mul(x, r)
        y = Mul(gamma, n)""",
}
NOT_NORMS = {
    "other_mean": SPELLINGS["torch"].replace("q = Pow(d, two)", "q = Pow(x, two)"),
    "two_axes": SPELLINGS["torch"].replace("axes=-1", "axes=-2,-1"),
    "cube": SPELLINGS["torch"].replace("q = Pow(d, two)", "q = Pow(d, three)"),
}


def model(text: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    numbers = {"two": 2.0, "three": 3.0, "one": 1.0, "eps": 1e-5, "gamma": rng.random(WIDTH) + 0.5}
    numbers["beta"] = rng.standard_normal(WIDTH)
    nodes = []
    for line in text.split("\n"):
        if "=" not in line:
            continue
        out, rest = (part.strip() for part in line.split("=", 1))
        op, args = rest.split("(")
        names, attrs = args.split(")")
        axes = {"axes": [int(a) for a in attrs.split("=")[1].split(",")]} if "axes" in attrs else {}
        nodes.append(helper.make_node(op, names.split(", "), [out], **axes))
    used = {i for n in nodes for i in n.input}
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in numbers.items() if k in used]
    shape = [2, TOKENS, WIDTH]
    values = [helper.make_tensor_value_info(n, 1, shape) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "norm", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def counts(proto: onnx.ModelProto) -> dict[str, int]:
    graph = Graph.of(tvm.transform.Sequential(simplify_passes())(load_model(proto).mod))
    assert graph is not None
    found = {name: graph.count(name) for name in ("nn.layer_norm", "nn.rms_norm", "mean", "sqrt", "multiply", "add")}
    return {name: n for name, n in found.items() if n}


def check(proto: onnx.ModelProto) -> None:
    x = (3 + np.random.default_rng(1).standard_normal((2, TOKENS, WIDTH))).astype(np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x})[0]
    got = skimtvm.compile(proto, calibration="none").run({"x": x})["y"]
    # means of WIDTH numbers near 3 are known to some units in the last place, which the division by a deviation of 1 keeps
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=WIDTH * 3 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_norm_is_one_operator(spelling: str) -> None:
    proto = model(SPELLINGS[spelling])
    assert counts(proto) == {"nn.rms_norm" if spelling == "rms" else "nn.layer_norm": 1}
    check(proto)


@pytest.mark.parametrize("spelling", NOT_NORMS)
def test_what_only_looks_like_a_norm_stays(spelling: str) -> None:
    proto = model(NOT_NORMS[spelling])
    assert not {"nn.layer_norm", "nn.rms_norm"} & set(counts(proto))
    if spelling != "cube":  # its root may be of a negative number
        check(proto)


def test_positions_expanded_to_the_batch_are_kept_once() -> None:
    numbers = np.broadcast_to(np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)), (2, TOKENS, WIDTH))
    proto = model("y = Add(x, p)")
    proto.graph.initializer.append(numpy_helper.from_array(numbers.astype(np.float32), "p"))
    graph = Graph.of(tvm.transform.Sequential(simplify_passes())(load_model(proto).mod))
    assert graph is not None
    (add,) = graph.defs.values()
    assert [int(d) for d in add.args[1].ty.shape.values] == [1, TOKENS, WIDTH]
    check(proto)
