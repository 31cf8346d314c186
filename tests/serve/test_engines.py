"""Engines, and the proof that the rows of a batch are independent before requests share one."""

import subprocess
import sys

import numpy as np
import pytest

from skimtvm.errors import InvalidModel, InvalidOption, UnsupportedModel
from skimtvm.report import TensorSpec
from skimtvm.serve.engines import describe, open_engine

from .helpers import environment


class Engine:
    platform = "test"

    def __init__(self, function, shape=(4, 3), batches=(4,)):
        self.inputs = (TensorSpec("x", shape, "float32"),)
        self.outputs = (TensorSpec("y", shape, "float32"),)
        self.batches, self.function, self.seen = batches, function, []

    def run(self, feeds):
        self.seen.append(feeds["x"].shape)
        return {"y": self.function(feeds["x"])}


def test_independent_rows_share_a_batch():
    engine = Engine(np.tanh, batches=(1, 2, 4))
    signature, reason = describe(engine, "m")
    assert reason is None and signature.row_axis and signature.batches == (1, 2, 4)
    assert {shape[0] for shape in engine.seen} == {1, 4}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: np.exp(x) / np.exp(x).sum(axis=0),
        lambda x: x - x.mean(axis=0),
        lambda x: np.cumsum(x, axis=0),
        lambda x: x * np.arange(4, dtype=np.float32)[:, None],
        lambda x: x[::-1],
    ],
)
def test_rows_that_depend_on_others_or_on_their_place_do_not(function):
    signature, reason = describe(Engine(function), "m")
    assert not signature.row_axis and signature.batches == (1,) and "output 'y'" in reason
    assert signature.metadata()["inputs"][0]["shape"] == [4, 3]


def test_batch_of_one_is_a_fixed_shape():
    engine = Engine(np.tanh, shape=(1, 3), batches=(1,))
    signature, reason = describe(engine, "m")
    assert reason is None and not signature.row_axis and engine.seen == [(1, 3)]


def test_a_module_of_several_sizes_takes_any_number_of_rows(onnx_file, tmp_path):
    path = tmp_path / "sizes.so"
    command = [sys.executable, "-m", "skimtvm", "compile", str(onnx_file), "-o", str(path), "--batch", "1,4", "--quiet"]
    subprocess.run(command, check=True, env=environment())
    text = """
import sys, numpy as np
from skimtvm.serve.engines import describe, open_engine
from skimtvm.serve.load_client import Valid
engine = open_engine("skimtvm", sys.argv[1], 1)
signature, reason = describe(engine, "m")
assert reason is None and signature.batches == (1, 2, 3, 4) and signature.row_axis
one = Valid(engine, signature, 2)
for rows in range(1, 5):
    out = engine.run({"x": np.repeat(one._feeds[1][0], rows, 0), "mask": np.repeat(one._feeds[1][1], rows, 0)})
    assert np.allclose(out["y"], np.repeat(one._expected[1][0], rows, 0), atol=1e-5) and len(out["sum"]) == rows
"""
    subprocess.run([sys.executable, "-c", text, str(path)], check=True, env=environment())


def test_onnxruntime(onnx_file, tmp_path):
    import onnx

    fixed = tmp_path / "fixed.onnx"
    model = onnx.load(onnx_file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, fixed)
    engine = open_engine("onnxruntime", fixed, 1)
    signature, _ = describe(engine, "m")
    assert signature.batches == (2,) and [s.dtype for s in signature.inputs] == ["float32", "int64"]
    with pytest.raises(UnsupportedModel, match="free dimensions"):
        open_engine("onnxruntime", onnx_file, 1)
    with pytest.raises(InvalidModel, match="cannot load"):
        open_engine("onnxruntime", tmp_path / "none.onnx", 1)
    with pytest.raises(InvalidOption, match="unknown"):
        open_engine("torch", fixed, 1)


def test_the_front_loads_neither_the_model_nor_tvm():
    text = "import sys, skimtvm.serve.server; assert not {'tvm', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], check=True, env=environment())
