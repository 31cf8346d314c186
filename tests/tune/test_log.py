"""The log: round trip, damage, several writers, kills, pruning and merging."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skimtvm.errors import InvalidOption, OutputExists
from skimtvm.tune import log
from skimtvm.tune.log import Log, Record, append

from .samples import conv_site, fc_site, record


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "trial", "median_s": None, "spread": None, "default_s": None, "error": "signal 11"},
        {"predicted": 1.25, "versions": {"skimtvm": "0"}, "cpu_model": "Ä CPU"},
    ],
)
@pytest.mark.parametrize("site", [conv_site(), fc_site()], ids=["conv", "fc"])
def test_round_trip(site: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    written = record(site, **changes)
    append(tmp_path, written)
    read = Log.read(tmp_path)
    assert read.records == (written,) and not read.damage
    assert json.loads(written.to_json())["density"] == written.sparsity.density


def test_unknown_fields_are_ignored_and_required_ones_are_required() -> None:
    raw = json.loads(record(conv_site()).to_json())
    assert Record.from_json(json.dumps(raw | {"weather": "fine"})) == record(conv_site(), time=raw["time"])
    for name in ("kind", "workload", "sparsity", "median_s", "version"):
        with pytest.raises(ValueError, match=name):
            Record.from_json(json.dumps({k: v for k, v in raw.items() if k != name}))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"kind": "worst"},
        {"median_s": -1},
        {"median_s": "fast"},
        {"workload": {"type": "conv3d"}},
        {"workload": {"type": "conv2d", "n": 0}},
        {"knobs": {"rows": "1"}},
        {"spread": [1]},
        {"sparsity": {}},
        {"default_knobs": None},
        {"cpu": "../elsewhere"},
        {"kernel": "a/b"},
        {"kernel": ".hidden"},
        {"version": ["a"]},
        {"layout": {}},
        {"threads": "1"},
        {"predicted": float("nan")},
        {"time": "\ud800"},
        {"versions": {"skimtvm": 1}},
        {"default_s": 10**400},
    ],
    ids=str,
)
def test_damaged_fields(change: dict[str, Any], tmp_path: Path) -> None:
    raw = json.loads(record(conv_site()).to_json()) | change
    with pytest.raises(ValueError):
        Record.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "change",
    [
        {"workload": {"n": 0}},
        {"workload": {"padding": [0, 0]}},
        {"workload": {"c": 1.5}},
        {"sparsity": {"signature": {}}},
    ],
    ids=str,
)
def test_damaged_parts(change: dict[str, Any]) -> None:
    raw = json.loads(record(conv_site()).to_json())
    for name, part in change.items():
        raw[name] |= part
    with pytest.raises(ValueError):
        Record.from_json(json.dumps(raw))


def test_a_line_of_brackets_is_damaged() -> None:
    with pytest.raises(ValueError, match="deep"):
        Record.from_json("[" * 100_000)


def test_a_damaged_line_is_named_and_skipped(tmp_path: Path) -> None:
    good = record(conv_site())
    append(tmp_path, good)
    path = log.path_of(tmp_path, good)
    with path.open("ab") as f:
        f.write(b'{"schema": 1, "kind"\n\xff\xfe\n\n[]\n')
    append(tmp_path, good)
    read = Log.read(tmp_path)
    assert len(read.records) == 2
    assert [(d.path, d.line) for d in read.damage] == [(path, 2), (path, 3), (path, 5)]


def test_a_torn_last_line_costs_itself_alone(tmp_path: Path) -> None:
    good = record(conv_site())
    append(tmp_path, good)
    path = log.path_of(tmp_path, good)
    with path.open("ab") as f:
        f.write(good.to_json().encode()[:100])
    append(tmp_path, good)
    read = Log.read(tmp_path)
    assert len(read.records) == 2 and [d.line for d in read.damage] == [2]


WRITER = """
import sys
from pathlib import Path
from tests.tune.samples import conv_site, record
from skimtvm.tune.log import append
from skimtvm.target import TARGETS
r = record(conv_site(), TARGETS["znver4"], samples=int(sys.argv[2]), version="x")
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    append(Path(sys.argv[1]), r)
"""


def _writer(folder: Path, mark: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(mark), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent)


def test_two_writers_and_a_pruner_lose_nothing(tmp_path: Path) -> None:
    writers = [_writer(tmp_path, mark, 300) for mark in (1, 2)]
    path = tmp_path / "znver4" / "csr_conv2d.jsonl"
    rewrites = 0
    while any(w.poll() is None for w in writers):
        if path.exists():
            log.rewrite(path, lambda records: records)  # replaces the file under the writers
            rewrites += 1
        time.sleep(0.01)
    assert [w.wait() for w in writers] == [0, 0] and rewrites
    read = Log.read(tmp_path)
    assert not read.damage
    assert sorted(r.samples for r in read.records) == [1] * 300 + [2] * 300


def test_kill_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    writer = _writer(tmp_path, 1, 1_000_000)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    before = Log.read(tmp_path)
    append(tmp_path, record(conv_site(), log_target(), version="x", samples=2))
    after = Log.read(tmp_path)
    assert before.records and len(before.damage) <= 1
    assert len(after.records) == len(before.records) + 1 and len(after.damage) == len(before.damage)


def log_target() -> Any:
    from skimtvm.target import TARGETS

    return TARGETS["znver4"]


def test_prune_keeps_the_newest_best(tmp_path: Path) -> None:
    site, other = conv_site(), fc_site()
    for r in (
        record(site, kind="trial"), record(site, median_s=3e-3), record(site, median_s=1.5e-3), record(other),
        record(site, threads=2), record(other, version="old", threads=4),
    ):  # fmt: skip
        append(tmp_path, r)
    assert log.prune(tmp_path, lambda r: r.version != "old") == (6, 3)
    read = Log.read(tmp_path)
    assert {(r.kernel, r.threads, r.median_s) for r in read.records} == {
        ("csr_conv2d", 1, 1.5e-3), ("csr_conv2d", 2, 1e-3), ("sell_fc", 1, 1e-3)
    }  # fmt: skip
    assert not list(tmp_path.rglob(".*"))


def test_merge_adds_what_is_missing(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    first, second = record(conv_site()), record(fc_site())
    append(a, first)
    append(b, first)
    append(b, second)
    assert log.merge(a, [b]) == 1 and log.merge(a, [b]) == 0
    assert Log.read(a).records == (first, second)


def test_bad_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidOption, match="no folder"):
        Log.read(file)
    with pytest.raises(OutputExists, match="cannot be written"):
        append(file, record(conv_site()))
    assert Log.read(tmp_path / "missing") == Log()


def test_gain() -> None:
    r = record(conv_site())
    assert r.gain == 2.0 and r.is_default
    assert dataclasses.replace(r, median_s=None).gain == 0.0
    assert os.fspath(log.SHIPPED).endswith("tuning_logs")
