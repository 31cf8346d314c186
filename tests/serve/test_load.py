"""Mixed load at twice the capacity: every valid request answered right or refused with 503, none lost, memory flat, killed
workers replaced. A quarter of a minute here, a whole one with ``-m slow``; thirty with the module itself."""

import json
import subprocess
import sys

import pytest

from .helpers import environment


def load(served, tmp_path, minutes, *arguments):
    output = tmp_path / "load.json"
    command = [sys.executable, "-m", "skimtvm.serve.load", str(served), "--minutes", str(minutes), "--workers", "2"]
    command += ["--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment())
    assert output.exists(), done.stdout + done.stderr
    result = json.loads(output.read_text())
    overload = result["overload"]
    assert not overload["wrong"], overload["wrong_examples"]
    assert not overload["lost_or_other"] and not overload["unanswered"], overload
    assert overload["right"] > 0 and overload["refused_503"] > 0
    assert overload["sent"] == overload["right"] + overload["refused_503"]
    assert not overload["malformed_other"] and overload["malformed_sent"] > 0, overload
    assert result["workers_killed"] > 0 and result["workers_replaced"] >= result["workers_killed"]
    assert result["workers_ready_at_end"] == 2
    assert result["exit_code"] == 0 and result["passed"] and done.returncode == 0
    return result


def test_overload(served, tmp_path):
    load(served, tmp_path, 0.15, "--kill-every", "4")


@pytest.mark.slow
def test_overload_for_a_minute(served, tmp_path):
    result = load(served, tmp_path, 1, "--kill-every", "20")
    for part in ("front", "worker"):
        memory = result["memory"][part]
        assert memory["growth_mb"] < 0.05 * memory["early_mb"] + 2, result["memory"]


def test_existing_output_is_kept(served, tmp_path):
    output = tmp_path / "mine.json"
    output.write_text("mine")
    command = [sys.executable, "-m", "skimtvm.serve.load", str(served), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment())
    assert done.returncode == 2 and "exists" in done.stderr and output.read_text() == "mine"
