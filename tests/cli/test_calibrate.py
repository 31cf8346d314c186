"""skimtvm calibrate as a user meets it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table(skim: Any, interruptible: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration that Ctrl-C has interrupted and that was finished then."""
    table = tmp_path_factory.mktemp("calibrate") / "c.json"
    kept = table.with_name("c.json.partial")
    process = interruptible([sys.executable, "-m", "skimtvm", "calibrate", "--quick", "-o", str(table)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (kept.is_file() and kept.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "skimtvm: error: interrupted" in err, err
    assert not table.exists()
    first = json.loads(kept.read_text().splitlines()[2])
    with kept.open("a") as file:
        file.write('[{"kernel": "den')  # as a kill while it writes would leave it
    out = skim("calibrate", "--quick", "-o", table).succeeded()
    assert "GFLOP/s" in out and "alpha" in out and str(table) in out
    assert not kept.exists()
    points = json.loads(table.read_text())["points"]
    assert [p["seconds"] for p in points[: len(first)]] == pytest.approx([p["seconds"] for p in first], rel=1e-4)
    return table


def test_ctrl_c_keeps_what_was_measured(skim: Any, table: Path) -> None:
    """See the fixture. What is finished is kept, too."""
    raw = json.loads(table.read_text())
    names = {"dense", "csr", "bsr4", "bsr8", "bsr16", "winograd2", "winograd4", "sell"}
    assert {p["kernel"] for p in raw["points"]} == names
    assert all(p["seconds"] > 0 and p["code"].startswith("f32_") for p in raw["points"])
    before = table.read_bytes()
    assert skim("calibrate", "--quick", "-o", table).code == 5 and table.read_bytes() == before


def test_compile_and_prune_by_the_table(skim: Any, table: Path, net: Path, tmp_path: Path) -> None:
    explained = skim("compile", net, "-o", tmp_path / "a.so", "--calibration", table, "--explain")
    assert explained.code == 0, explained.err
    assert "kernels chosen by the measured table: " in explained.out
    assert "measured" in explained.out.split("kernels chosen")[0] and "model" not in explained.out
    built_in = skim("compile", net, "-o", tmp_path / "b.so", "--calibration", "none", "--explain")
    assert "chosen by the built-in model" in built_in.out and "model" in built_in.out
    assert "measured" not in built_in.out
    # A table that says that dense kernels take no time is obeyed.
    raw = json.loads(table.read_text())
    raw["points"] = [p | {"seconds": p["seconds"] / (1e6 if p["kernel"] == "dense" else 1)} for p in raw["points"]]
    fast = tmp_path / "c.json"
    fast.write_text(json.dumps(raw))
    dense = skim("compile", net, "-o", tmp_path / "c.so", "--calibration", fast, "--explain")
    assert dense.out.count("f32_dense_conv2d") == 2 and "break-even" in dense.out
    guided = skim("prune", net, "-o", tmp_path / "p.onnx", "--sparsity", 0.9, "--guided", "--alphas", fast)
    assert guided.code == 0 and guided.out.count("leave dense") == 2
    other = skim("compile", net, "-o", tmp_path / "d.so", "--target", "haswell", "--explain")
    assert "built-in model: no calibration of haswell" in other.out


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
def test_bad_options(skim_here: Any, net: Path, args: tuple[str, ...], code: int, message: str) -> None:
    done = skim_here(*(net if a == "NET" else a for a in args))
    assert done.code == code and message in done.err and "Traceback" not in done.err
