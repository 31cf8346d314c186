"""LSTM, GRU and RNN nodes against ONNX Runtime: every attribute that is unrolled, and what is refused."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import skimtvm
from skimtvm.compiler import CompileOptions, lower_model
from skimtvm.errors import UnsupportedModel
from skimtvm.onnx_recurrent import GATES, MOST_STEPS
from skimtvm.target import resolve

T, B, I, H = 5, 2, 7, 6

Feeds = dict[str, np.ndarray]


def layer(
    kind: str,
    *,
    steps: int = T,
    batch: int = B,
    bias: bool = True,
    states: str = "",
    lengths: Any = None,
    peepholes: bool = False,
    density: float = 1.0,
    outputs: str = "y h c",
    given: str = "x",
    **attrs: Any,
) -> tuple[onnx.ModelProto, Feeds]:
    """One recurrent node and its inputs. ``states``: "const", "input" or none; ``given``: inputs that are no constants."""
    rng = np.random.default_rng(5)
    directions, gates = 2 if attrs.get("direction") == "bidirectional" else 1, GATES[kind]
    first = attrs.get("layout", 0)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32) * 0.5
    values: Feeds = {
        "x": make(*((batch, steps) if first else (steps, batch)), I),
        "w": make(directions, gates * H, I),
        "r": make(directions, gates * H, H) * (rng.random((directions, gates * H, H)) < density).astype(np.float32),
    }
    names = ["x", "w", "r", "b" if bias else "", "", "", "", ""]
    if bias:
        values["b"] = make(directions, 2 * gates * H)
    if lengths is not None:
        values["lengths"], names[4] = np.array(lengths, np.int32), "lengths"
    if states:
        for k, name in ((5, "h0"), (6, "c0"))[: 2 if kind == "LSTM" else 1]:
            values[name], names[k] = make(*((batch, directions) if first else (directions, batch)), H), name
    if peepholes:
        values["p"], names[7] = make(directions, 3 * H), "p"
    names = names[: 8 if kind == "LSTM" else 6]
    inputs = [*given.split(), *(["h0", "c0"] if states == "input" else [])]
    wanted = outputs.split()[: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, names, [o if o != "-" else "" for o in wanted], name="cell", hidden_size=H, **attrs)
    info = lambda name: helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
    )
    graph = helper.make_graph(
        [node], "g", [info(n) for n in inputs if n in values],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in wanted if o != "-"],
        [numpy_helper.from_array(v, n) for n, v in values.items() if n not in inputs],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model), {n: v for n, v in values.items() if n in inputs}


def agrees(model: onnx.ModelProto, feeds: Feeds, want: list[np.ndarray] | None = None) -> None:
    """To a few roundings: a state is at most about 1, and steps add their errors."""
    if want is None:
        want = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    got = skimtvm.compile(model).run(feeds)
    for output, expected in zip(model.graph.output, want, strict=True):
        assert got[output.name].shape == expected.shape
        np.testing.assert_allclose(got[output.name], expected, rtol=0, atol=2e-6 * T)


DIRECTIONS = ["forward", "reverse", "bidirectional"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", GATES)
def test_directions(kind: str, direction: str) -> None:
    agrees(*layer(kind, direction=direction, states="const"))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"steps": 1, "states": "input"},
        {"batch": 1, "outputs": "- h c"},
        {"lengths": [T] * B, "outputs": "y"},
        {"clip": 0.3},
        {"states": "input", "direction": "bidirectional", "batch": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", GATES)
def test_options(kind: str, options: dict[str, Any]) -> None:
    agrees(*layer(kind, **options))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"states": "const", "direction": "bidirectional"}], ids=str)
def test_gru_that_resets_late(options: dict[str, Any]) -> None:
    agrees(*layer("GRU", linear_before_reset=1, **options))


@pytest.mark.parametrize("options", [{"peepholes": True}, {"input_forget": 1}], ids=str)
@pytest.mark.parametrize("states", ["", "const"])
def test_lstm_variants(options: dict[str, Any], states: str) -> None:
    agrees(*layer("LSTM", states=states, direction="bidirectional", **options))


def test_other_activations() -> None:
    agrees(*layer("RNN", activations=["Relu"]))
    agrees(*layer("LSTM", activations=["HardSigmoid", "Softsign", "Tanh"]))
    agrees(*layer("GRU", activations=["Sigmoid", "Tanh", "Sigmoid", "Relu"], direction="bidirectional"))


@pytest.mark.parametrize("kind", GATES)
def test_batch_first(kind: str) -> None:
    """ONNX Runtime has no ``layout``: the same layer with time outermost."""
    options = {"direction": "bidirectional", "states": "const"}
    first, feeds = layer(kind, layout=1, **options)
    last, _ = layer(kind, **options)
    turn = {"x": (1, 0, 2), "h0": (1, 0, 2), "c0": (1, 0, 2)}
    for tensor in first.graph.initializer:
        if tensor.name in turn:
            array = numpy_helper.to_array(tensor).transpose(1, 0, 2)
            twin = next(t for t in last.graph.initializer if t.name == tensor.name)
            twin.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    y, *states = ort.InferenceSession(last.SerializeToString()).run(None, {"x": feeds["x"].transpose(1, 0, 2)})
    agrees(first, feeds, [y.transpose(2, 0, 1, 3), *(s.transpose(1, 0, 2) for s in states)])


def test_computed_weights() -> None:
    agrees(*layer("LSTM", given="x w r b", direction="bidirectional"))


def test_pruned_weights_take_the_sparse_kernel_and_are_shared() -> None:
    model, _ = layer("LSTM", density=0.1, batch=1, steps=8)
    ((_, result),) = lower_model(model, CompileOptions(calibration="none"), resolve("x86-64-v4"))
    steps = [r for r in result.layers if r.name.startswith("cell/step")]
    assert len(steps) == 7, "the first one has no state"
    assert {r.kernel.split("_")[1] for r in steps} == {"sell"}
    shared = collections.Counter(r.symbol for r in steps)
    assert len(shared) == 1, "one kernel for all steps"


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [T, T - 1]},
        {"activations": ["LeakyRelu"], "activation_alpha": [0.2]},
        {"activations": ["Affine"]},
        {"steps": MOST_STEPS + 1, "batch": 1},
    ],
    ids=str,
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"RNN \(node 'cell'.*full length") as err:
        skimtvm.compile(layer("RNN", **options)[0])
    assert "\n" not in str(err.value)
