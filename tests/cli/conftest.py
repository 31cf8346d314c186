"""Fixtures: the command as users start it, and a compiled sample to give it."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import skimtvm

PACKAGE = Path(skimtvm.__file__).parent.parent
SAMPLE = Path(__file__).parent.parent / "runtime" / "sample.py"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def failed(self, code: int, *texts: str) -> None:
        """Check that the command ended with ``code`` and exactly one line on stderr that holds ``texts``."""
        assert self.code == code, self
        assert self.err.startswith("skimtvm: error: ") and self.err.count("\n") == 1, self.err
        for text in texts:
            assert text in self.err

    def succeeded(self) -> str:
        assert self.code == 0, self.err
        return self.out


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(PACKAGE), **more}


@pytest.fixture(scope="session")
def interruptible():
    """Start a command that Ctrl-C can end. Where the tests run in the background of a shell SIGINT is ignored, and children
    inherit that."""

    def start(command):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        finally:
            signal.signal(signal.SIGINT, before)

    return start


@pytest.fixture(scope="session")
def skim():
    def run(*arguments, cwd=None, timeout=300, **env):
        args = [sys.executable, "-m", "skimtvm", *map(str, arguments)]
        done = subprocess.run(
            args, capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd, env=environment(**env)
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def skim_here(monkeypatch):
    """As ``skim``, but in this process: for further cases of commands that other tests start as users do. An import of TVM
    takes longer than most errors."""

    def run(*arguments, cwd=None):
        from skimtvm.cli import main
        from skimtvm.tvm_runtime import import_compiler

        import_compiler()  # some commands would load TVM without it, for all tests that follow
        monkeypatch.setattr("skimtvm._torch.own_process", lambda: None)
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(a) for a in arguments])
        except SystemExit as end:
            return Result(end.code, out.getvalue(), err.getvalue())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        raise AssertionError("the command did not exit")

    return run


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("module") / "sample.so"
    subprocess.run([sys.executable, str(SAMPLE), str(path)], check=True, env=environment())
    return path


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory):
    """conv1 3->16 dense, conv2 16->32 with 10 % nonzeros, pool, dense layer without a node name."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def weights(name, shape, density):
        w = rng.standard_normal(shape).astype("float32") * np.float32(0.1)
        w[rng.random(shape) >= density] = 0
        return numpy_helper.from_array(w, name)

    nodes = [
        helper.make_node("Conv", ["data", "w1"], ["a"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w3"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [weights("w1", (16, 3, 3, 3), 1), weights("w2", (32, 16, 3, 3), 0.1), weights("w3", (10, 32), 1)],
    )
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="session")
def several(skim, onnx_file, tmp_path_factory):
    """``onnx_file`` for 1 and 4 images."""
    path = tmp_path_factory.mktemp("several") / "several.so"
    out = skim("compile", onnx_file, "-o", path, "--batch", "4,1").succeeded()
    assert "batches 1, 4, target" in out
    return path


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """Two sparse 3x3 convolutions: something to tune."""
    import onnx

    from tests.tune.samples import model

    path = tmp_path_factory.mktemp("net") / "two.onnx"
    onnx.save(model(), str(path))
    return path
