"""skimtvm tune and log as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skimtvm.tune.log import Log
from tests.tune.samples import conv_site, record


def test_tune_resume_and_compile(skim: Any, net: Path, tmp_path: Path) -> None:
    tune = ("tune", net, "--log", tmp_path / "log", "--search", "random")
    first = skim(*tune, "--trials", 3)
    assert first.code == 0, first.err
    assert "2 of 2 workloads tuned" in first.out and "2 workloads to tune" in first.err
    second = skim(*tune, "--trials", 5, "--report", tmp_path / "report.json")
    assert second.code == 0, second.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(w["trials"], w["resumed"]) for w in report["workloads"]] == [(5, 3)] * 2
    assert skim(*tune, "--report", tmp_path / "report.json").code == 5
    shown = skim("log", "show", tmp_path / "log")
    assert "14 records" in shown.out and "csr_conv2d" in shown.out
    compiled = skim("compile", net, "-o", tmp_path / "m.so", "--log", tmp_path / "log", "--explain")
    assert compiled.code == 0 and compiled.out.count("; tuned") == 2
    best = skim("log", "best", tmp_path / "log")
    assert best.out.count("csr_conv2d") == 2
    assert "2 records kept" in skim("log", "prune", tmp_path / "log").out
    assert "2 records added" in skim("log", "merge", tmp_path / "other", tmp_path / "log").out


def test_kill_and_go_on(net: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skimtvm", "tune", str(net), "--log", str(tmp_path), "--search", "random"]
    process = subprocess.Popen([*command, "--trials", "500"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(Log.read(tmp_path).records) < 10:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = Log.read(tmp_path)
    assert len(before.records) >= 10 and len(before.damage) <= 1
    done = subprocess.run(
        [*command, "--trials", "5", "--time-budget", "60s"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = Log.read(tmp_path)
    assert after.records[: len(before.records)] == before.records and after.damage == before.damage
    assert sum(r.kind == "best" for r in after.records) == 2


def test_ctrl_c_keeps_what_was_measured(net: Path, interruptible: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skimtvm", "tune", str(net), "--log", str(tmp_path), "--search", "random"]
    process = interruptible([*command, "--trials", "500"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not Log.read(tmp_path).records:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "skimtvm: error: interrupted" in err, err
    assert "of 2 workloads tuned" in out and Log.read(tmp_path).records and not Log.read(tmp_path).damage


@pytest.mark.parametrize(
    "args,code,message",
    [
        (("--trials", "0"), 2, "0 is not in the range"),
        (("--time-budget", "soon"), 2, "no time"),
        (("--rpc-tracker", "here", "--rpc-key", "k"), 2, "HOST:PORT"),
        (("--rpc-tracker", "127.0.0.1:9"), 2, "belong together"),
        (("--rpc-tracker", "127.0.0.1:9", "--rpc-key", "k"), 8, "does not answer"),
        (("--target", "haswell"), 2, "is not this machine"),
        (("--target", "z80"), 2, "unknown"),
        (("--log", __file__), 2, "is a file"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else None,
)
def test_bad_options(skim_here: Any, net: Path, args: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    log = () if "--log" in args else ("--log", tmp_path)
    done = skim_here("tune", net, *log, "--search", "random", *args)
    assert done.code == code and message in done.err and "Traceback" not in done.err


def test_log_reports_damage(skim: Any, tmp_path: Path) -> None:
    from skimtvm.tune.log import append, path_of

    r = record(conv_site())
    append(tmp_path, r)
    with path_of(tmp_path, r).open("a") as f:
        f.write("nonsense\n")
    shown = skim("log", "show", tmp_path)
    assert shown.code == 0 and "csr_conv2d.jsonl:2: damaged" in shown.err and "1 record" in shown.out
    assert skim("log", "show", tmp_path / "missing").code == 2
    compiled = skim("compile", "x.onnx", "-o", tmp_path / "m.so", "--log", tmp_path / "missing")
    assert compiled.code == 2 and "no folder" in compiled.err
