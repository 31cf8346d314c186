"""The ONNX backend adaptor, and a fixed sample of ONNX's own suite against the committed list."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import helper as h
from onnx.backend.base import Backend, BackendRep

import skimtvm.onnx_backend as backend
from skimtvm import conformance
from skimtvm.errors import InputMismatch, InvalidOption, UnsupportedModel

LIST = Path(__file__).parents[2] / "docs" / "onnx_conformance.txt"


def model(nodes, inputs, outputs, opset=18):
    values = [[h.make_tensor_value_info(k, t, s) for k, (t, s) in v.items()] for v in (inputs, outputs)]
    return h.make_model(h.make_graph(nodes, "g", *values), opset_imports=[h.make_opsetid("", opset)], ir_version=8)


def reshape():
    nodes = [h.make_node("Relu", ["x"], ["r"]), h.make_node("Reshape", ["r", "shape"], ["y"])]
    return model(nodes, {"x": (TP.FLOAT, [2, 6]), "shape": (TP.INT64, ["n"])}, {"y": (TP.FLOAT, None)})


def test_it_is_a_backend():
    assert issubclass(backend.SkimBackend, Backend)
    assert backend.supports_device("CPU") and backend.supports_device("CPU:0") and not backend.supports_device("CUDA")
    with pytest.raises(InvalidOption, match="CUDA"):
        backend.prepare(reshape(), "CUDA")


def test_outputs_have_names_and_the_declared_type():
    double = model([h.make_node("Exp", ["x"], ["y"])], {"x": (TP.DOUBLE, [3])}, {"y": (TP.DOUBLE, [3])})
    x = np.array([0.0, 1.0, -2.0])
    rep = backend.prepare(double)
    assert isinstance(rep, BackendRep)
    for feeds in ([x], x, {"x": x}):
        out = rep.run(feeds)
        assert out.y is out[0] and out.y.dtype == np.float64
        np.testing.assert_allclose(out.y, np.exp(x), rtol=1e-6)


def test_parameters_may_be_fed_as_inputs():
    rep, x = backend.prepare(reshape()), np.arange(-6, 6, dtype=np.float32).reshape(2, 6)
    for shape in ([3, 4], [12], [3, 4], [4, -1]):
        (y,) = rep.run([x, np.array(shape, np.int64)])
        np.testing.assert_array_equal(y, np.maximum(x, 0).reshape(shape))
    assert backend.is_compatible(reshape())


def test_what_cannot_be_compiled_is_refused():
    loop = model([h.make_node("NonZero", ["x"], ["y"])], {"x": (TP.FLOAT, [3])}, {"y": (TP.INT64, [1, "n"])})
    assert not backend.is_compatible(loop)
    with pytest.raises(UnsupportedModel):
        backend.prepare(loop)
    with pytest.raises(InputMismatch):
        backend.prepare(reshape()).run([np.zeros((2, 6), np.float32)] * 3)


def test_run_node():
    x = np.array([[1.0, 3.0, 2.0]], np.float32)
    (y,) = backend.run_node(h.make_node("Softmax", ["x"], ["y"], axis=1), [x])
    np.testing.assert_allclose(y, np.exp(x) / np.exp(x).sum(), rtol=1e-5)
    y, mean, _ = backend.run_node(h.make_node("LayerNormalization", ["x", "s"], ["y", "m", "d"]), [x, np.ones(3, "f")])
    np.testing.assert_allclose(mean, [[2.0]], rtol=1e-6)
    np.testing.assert_allclose(y, (x - 2) / np.sqrt(2 / 3 + 1e-5), rtol=1e-5)
    with pytest.raises(InputMismatch, match="Softmax"):
        backend.run_node(h.make_node("Softmax", ["x"], ["y"]), [x, x])


@pytest.fixture(scope="module")
def cases():
    return conformance.cases()


def rows():
    """(kind, case, outcome, outcome of TVM alone) of the committed list."""
    return [line.split() for line in LIST.read_text().splitlines() if not line.startswith("#")]


def same_onnx():
    return f"onnx {onnx.__version__}," in LIST.read_text().splitlines()[0]


def test_a_sample_of_the_suite_agrees_with_the_list(cases):
    """Each 25th case; the expanded attention takes a second to compile, and is left to the slow test."""
    sample = [c for c in cases if not c.name.startswith(("test_attention", "test_image_decoder"))][::25]
    assert len(sample) > 60
    known, found = conformance.read_list(LIST), conformance.skim_outcomes(sample)
    assert not {n: o for n, o in found.items() if o.status not in ("pass", "refused")}
    assert {n: o.status for n, o in found.items() if n in known} == {n: known[n][0] for n in found if n in known}


def test_the_list_has_every_case_no_wrong_numbers_and_no_crash(cases):
    known = conformance.read_list(LIST)
    assert len(known) == len(rows()) > 2000
    assert {ours for ours, _ in known.values()} == {"pass", "refused"}
    if same_onnx():
        assert [(c.kind, c.name) for c in cases] == [(kind, name) for kind, name, *_ in rows()]


def test_the_summary_counts_the_list():
    text = LIST.with_suffix(".md").read_text()
    kinds = {kind for kind, *_ in rows()}
    assert kinds == set(conformance.KINDS)
    for kind in (*kinds, "all"):
        chosen = [row for row in rows() if kind in ("all", row[0])]
        for column, engine in ((2, "SkimTVM"), (3, "TVM alone")):
            counts = Counter(row[column] for row in chosen)
            cells = " | ".join(str(counts[status]) for status in conformance.OUTCOMES)
            assert f"\n| {kind} | {len(chosen)} | {engine} | {cells} |\n" in text
    reasons = re.search(r"## Why cases are refused\n(.*)\n## ", text, re.DOTALL)
    counted = sum(int(n) for n in re.findall(r"^\| (\d+) \|", reasons.group(1), re.MULTILINE))
    assert counted == sum(row[2] == "refused" for row in rows())


def test_the_readme_has_the_counts_of_the_list():
    ours, theirs = Counter(row[2] for row in rows()), Counter(row[3] for row in rows())
    text = " ".join((LIST.parents[1] / "README.md").read_text().split())
    assert f"Of the {len(rows())} cases" in text
    assert f"{ours['pass']} pass and {ours['refused']} are refused" in text
    assert f"alone passes {theirs['pass']} and gives {theirs['wrong']} wrong results" in text


def test_a_crash_and_a_hang_cost_one_case(cases, monkeypatch):
    monkeypatch.setattr(conformance, "LIMIT", 0.2)
    sample = [c for c in cases if c.name in ("test_abs", "test_relu", "test_exp", "test_neg")]

    def run(net, batches):
        if net.graph.node[0].op_type == "Abs":
            os.abort()
        if net.graph.node[0].op_type == "Relu":
            while True:
                pass
        if net.graph.node[0].op_type == "Neg":
            raise ValueError("not\nmeant")
        return [[np.exp(i) for i in inputs] for inputs in batches]

    found = conformance.isolated(sample, run, (UnsupportedModel,), jobs=2)
    assert {n: o.status for n, o in found.items()} == {
        "test_abs": "crash", "test_exp": "pass", "test_neg": "error", "test_relu": "crash"
    }  # fmt: skip
    assert "SIGABRT" in found["test_abs"].note and found["test_neg"].note == "ValueError: not meant"


def test_a_result_of_another_shape_type_or_value_is_wrong(cases):
    (case,) = [c for c in cases if c.name == "test_reduce_sum_default_axes_keepdims_random"]
    want = case.data[0][1][0]

    def outcome(*outputs):
        return conformance.judge(case, lambda *_: [outputs], (UnsupportedModel,)).status

    assert outcome(want) == "pass"
    others = [want.reshape(()), want.reshape(1), want.astype(np.float64), want + 1, np.full_like(want, np.nan)]
    assert [outcome(other) for other in others] == ["wrong"] * 5
    assert outcome() == outcome(want, want) == "wrong"


def test_the_command_prints_outcomes():
    command = [sys.executable, "-m", "skimtvm.conformance", "--only", "^test_(abs|nonzero_example)$"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pass    test_abs" in done.stdout and "refused test_nonzero_example" in done.stdout


def test_onnx_own_runner_accepts_the_backend():
    """The whole of onnx.backend.test runs on the adaptor: here two cases of it."""
    from onnx.backend.test import BackendTest

    suite = BackendTest(backend, __name__).include("^test_(relu|softmax_axis_1)_cpu$").test_cases
    cases = suite["OnnxBackendNodeModelTest"]
    for name in ("test_relu_cpu", "test_softmax_axis_1_cpu"):
        getattr(cases(name), name)()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_suite_agrees_with_the_list(cases):
    known = conformance.read_list(LIST)
    found = conformance.skim_outcomes(cases, jobs=len(os.sched_getaffinity(0)))
    assert {n: o for n, o in found.items() if o.status not in ("pass", "refused")} == {}
    assert {n: o.status for n, o in found.items()} == {n: ours for n, (ours, _) in known.items()}
