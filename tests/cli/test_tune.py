"""skimtvm tune and log as a user meets them."""

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

from skimtvm.tune.log import Log
from tests.tune.samples import conv_site, model, record


def skimtvm(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skimtvm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **more)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "two.onnx"
    onnx.save(model(), str(path))
    return path


def test_tune_resume_and_compile(net: Path, tmp_path: Path) -> None:
    tune = ("tune", net, "--log", tmp_path / "log", "--search", "random")
    first = skimtvm(*tune, "--trials", 3)
    assert first.returncode == 0, first.stderr
    assert "2 of 2 workloads tuned" in first.stdout and "2 workloads to tune" in first.stderr
    second = skimtvm(*tune, "--trials", 5, "--report", tmp_path / "report.json")
    assert second.returncode == 0, second.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(w["trials"], w["resumed"]) for w in report["workloads"]] == [(5, 3)] * 2
    assert skimtvm(*tune, "--report", tmp_path / "report.json").returncode == 5
    shown = skimtvm("log", "show", tmp_path / "log")
    assert "14 records" in shown.stdout and "csr_conv2d" in shown.stdout
    compiled = skimtvm("compile", net, "-o", tmp_path / "m.so", "--log", tmp_path / "log", "--explain")
    assert compiled.returncode == 0 and compiled.stdout.count("; tuned") == 2
    best = skimtvm("log", "best", tmp_path / "log")
    assert best.stdout.count("csr_conv2d") == 2
    assert "2 records kept" in skimtvm("log", "prune", tmp_path / "log").stdout
    assert "2 records added" in skimtvm("log", "merge", tmp_path / "other", tmp_path / "log").stdout


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
def test_bad_options(net: Path, args: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    log = () if "--log" in args else ("--log", tmp_path)
    done = skimtvm("tune", net, *log, "--search", "random", *args)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_log_reports_damage(tmp_path: Path) -> None:
    from skimtvm.tune.log import append, path_of

    r = record(conv_site())
    append(tmp_path, r)
    with path_of(tmp_path, r).open("a") as f:
        f.write("nonsense\n")
    shown = skimtvm("log", "show", tmp_path)
    assert shown.returncode == 0 and "csr_conv2d.jsonl:2: damaged" in shown.stderr and "1 record" in shown.stdout
    assert skimtvm("log", "show", tmp_path / "missing").returncode == 2
    compiled = skimtvm("compile", "x.onnx", "-o", tmp_path / "m.so", "--log", tmp_path / "missing")
    assert compiled.returncode == 2 and "no folder" in compiled.stderr
