"""skimtvm calibrate as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.tune.samples import model


def skimtvm(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skimtvm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "two.onnx"
    onnx.save(model(), str(path))
    return path


def test_calibrate_and_compile(net: Path, tmp_path: Path) -> None:
    table = tmp_path / "c.json"
    done = skimtvm("calibrate", "--quick", "-o", table)
    assert done.returncode == 0, done.stderr
    assert "GFLOP/s" in done.stdout and "alpha" in done.stdout and str(table) in done.stdout
    raw = json.loads(table.read_text())
    assert {p["kernel"] for p in raw["points"]} == {"dense", "csr", "bsr4", "bsr8", "bsr16", "winograd2", "winograd4"}
    assert all(p["seconds"] > 0 and p["code"].startswith("f32_") for p in raw["points"])
    before = table.read_bytes()
    assert skimtvm("calibrate", "--quick", "-o", table).returncode == 5 and table.read_bytes() == before
    explained = skimtvm("compile", net, "-o", tmp_path / "a.so", "--calibration", table, "--explain")
    assert explained.returncode == 0, explained.stderr
    assert "kernels chosen by the measured table: " in explained.stdout
    assert "measured" in explained.stdout.split("kernels chosen")[0] and "model" not in explained.stdout
    built_in = skimtvm("compile", net, "-o", tmp_path / "b.so", "--calibration", "none", "--explain")
    assert "chosen by the built-in model" in built_in.stdout and "model" in built_in.stdout
    assert "measured" not in built_in.stdout
    # A table that says that dense kernels take no time is obeyed.
    raw["points"] = [p | {"seconds": p["seconds"] / (1e6 if p["kernel"] == "dense" else 1)} for p in raw["points"]]
    table.write_text(json.dumps(raw))
    dense = skimtvm("compile", net, "-o", tmp_path / "c.so", "--calibration", table, "--explain")
    assert dense.stdout.count("f32_dense_conv2d") == 2 and "break-even" in dense.stdout
    guided = skimtvm("prune", net, "-o", tmp_path / "p.onnx", "--sparsity", 0.9, "--guided", "--alphas", table)
    assert guided.returncode == 0 and guided.stdout.count("leave dense") == 2
    other = skimtvm("compile", net, "-o", tmp_path / "d.so", "--target", "haswell", "--explain")
    assert "built-in model: no calibration of haswell" in other.stdout


def test_ctrl_c_writes_nothing(interruptible: Any, tmp_path: Path) -> None:
    table = tmp_path / "c.json"
    command = [sys.executable, "-m", "skimtvm", "calibrate", "-o", str(table)]
    process = interruptible(command)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "skimtvm: error: interrupted" in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args,code,message",
    [
        (("calibrate", "--cpu", "9999"), 2, "may not run there"),
        (("calibrate", "-o", "/proc/none/c.json", "--quick"), 5, "cannot be written"),
        (("compile", "NET", "-o", "m.so", "--calibration", "missing.json"), 2, "cannot be read"),
        (("compile", "NET", "-o", "m.so", "--calibration", __file__), 2, "no JSON"),
        (("prune", "NET", "-o", "m.onnx", "--sparsity", "0.5", "--guided", "--alphas", __file__), 2, "JSON"),
    ],
    ids=["cpu", "folder", "missing", "damaged", "alphas"],
)
def test_bad_options(net: Path, args: tuple[str, ...], code: int, message: str) -> None:
    done = skimtvm(*(net if a == "NET" else a for a in args))
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
