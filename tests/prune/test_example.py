"""The experiment of examples/: from images to compiled networks on scikit-learn's digits, and its tables."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from skimtvm.errors import InvalidOption

from .conftest import PACKAGE

SCRIPT = PACKAGE / "examples" / "fashion_mnist.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="installed without the examples")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fashion_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made_up(example):
    """Two seeds of two methods; the second was not compiled and missed its aim."""
    runs = []
    for seed in (0, 1):
        row = {"method": "l1", "seed": seed, "dense_accuracy": 0.92, "accuracy": 0.919 + 0.002 * seed, "sparsity": 0.93,
               "pruned_sparsity": 0.95, "total_seconds": 600 + 60 * seed, "same_predictions": 10000 - seed,
               "network_speedup": 3.0 + seed}  # fmt: skip
        row["timing"] = [{"layer": "conv|1", "kernel": "csr", "density": 0.1, "ms": 0.1 + 0.1 * seed, "dense_ms": 0.6,
                          "speedup": 0}]  # fmt: skip
        runs += [row, row | {"method": "winograd", "accuracy": 0.9, "pruned_sparsity": 0.5}]
        for key in ("timing", "same_predictions", "network_speedup"):
            del runs[-1][key]
    return {"command": ["/some/where/fashion_mnist.py", "--data", "/home/me/idx"], "runs": runs,
            "summary": example.summary(runs)}  # fmt: skip


def test_tables_between_the_markers(example, tmp_path):
    report, readme = tmp_path / "r.json", tmp_path / "README.md"
    report.write_text(json.dumps(made_up(example)))
    readme.write_text(f"before\n{example.START}\nstale\n{example.END}\nafter\n")
    for _ in range(2):
        example.render(report, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{example.START}\n| method") and text.endswith(f"{example.END}\nafter\n")
    first, second = text.split("\n")[4:6]
    assert first == (
        "| L1, adjusted threshold | 2 | 92.00 (0.00) | 92.00 (0.14) | +0.00 (0.14), -0.10 to +0.10 | 93.0 (0.0) "
        "| yes (92 %, 0.3 points) | 10000, 9999 | 10.5 (0.7) | 3.50 (0.71)x |"
    )
    assert "-2.00 (0.00), -2.00 to -2.00 | 50.0 (0.0) | no (82 %, 0.5 points) | not compiled" in second
    assert "| conv\\|1 | `csr` | 0.100 | 0.1500 | 0.6000 | 4.00x |" in text and "stale" not in text
    assert "python fashion_mnist.py --data idx\n" in text and "/home" not in text


def test_what_cannot_be_rendered(example, tmp_path):
    report, readme = tmp_path / "r.json", tmp_path / "README.md"
    with pytest.raises(InvalidOption, match="is no report of this experiment"):
        example.render(report, readme)
    report.write_text('{"runs": []}')
    with pytest.raises(InvalidOption, match="summary"):
        example.render(report, readme)
    report.write_text(json.dumps(made_up(example)))
    readme.write_text("no markers\n")
    with pytest.raises(InvalidOption, match="add the two markers"):
        example.render(report, readme)
    assert readme.read_text() == "no markers\n"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn's digits")
def test_whole_path_on_digits(example, tmp_path):
    """Train, prune in three ways, fine-tune, export, compile: the same predictions as PyTorch, few of them lost."""
    arguments = ["--data", "digits", "--network", "small", "--epochs", "4+3+3", "--batch", "32", "--seeds", "0"]
    command = [
        sys.executable,
        SCRIPT,
        *arguments,
        "--threads",
        "1",
        "--runs",
        tmp_path / "runs",
        "--report",
        tmp_path / "r.json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    runs = {r["method"]: r for r in json.loads((tmp_path / "r.json").read_text())["runs"]}
    for method, (sparsity, _) in example.WANTED.items():
        r = runs[method]
        assert "compile_error" not in r, r["compile_error"]
        assert r["pruned_sparsity" if method == "winograd" else "sparsity"] >= sparsity - 0.005
        assert r["dense_accuracy"] > 0.95 and r["accuracy"] > r["dense_accuracy"] - 0.05, r
        assert r["same_predictions"] == r["images"] == 360 and r["compiled_accuracy"] == r["accuracy"], r
        assert len(r["timing"]) == 4
        if method != "winograd":
            assert {t["layer"] for t in r["timing"]} == {"conv1_3x3", "conv2_5x5", "conv3_3x3", "fc1"}
