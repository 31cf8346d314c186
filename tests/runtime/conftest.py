"""Fixtures: the sample module, compiled once, and its file."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm  # noqa: F401  the whole of it: loading a module first would leave this process without the compiler

import skimtvm

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def sample():
    spec = importlib.util.spec_from_file_location("skimtvm_test_sample", HERE / "sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def file(sample, tmp_path_factory):
    from skimtvm import artifact

    return artifact.write(sample.build(), tmp_path_factory.mktemp("sample") / "sample.so")


@pytest.fixture
def module(file):
    return skimtvm.load(file, threads=1)


@pytest.fixture
def data():
    return np.random.default_rng(7).standard_normal((1, 3, 8, 8)).astype("float32")


@pytest.fixture
def in_process():
    """Run Python text in a process of its own, where TVM has not been imported; returns its stdout."""

    def run(text, *arguments, timeout=120):
        args = [sys.executable, "-c", text, *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(Path(skimtvm.__file__).parent.parent)}
        done = subprocess.run(args, capture_output=True, text=True, timeout=timeout, check=False, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
