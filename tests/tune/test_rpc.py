"""Timing through TVM's RPC tracker: two servers on loopback, one of which dies. ``-m slow tests/tune/test_rpc.py``"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from skimtvm.errors import EnvironmentProblem
from skimtvm.tune.log import Log
from skimtvm.tune.measure import Measurer, Protocol, servers
from skimtvm.tune.worker import Options

from .samples import conv_site, model, task

pytestmark = pytest.mark.slow
KEY = "pool"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Pool:
    """A tracker and two servers, each in a process group of its own."""

    def __init__(self) -> None:
        self.tracker = ("127.0.0.1", free_port())
        self.processes = [self._start("rpc_tracker", self.tracker[1])]
        self._until(lambda: self._listens())
        address = f"{self.tracker[0]}:{self.tracker[1]}"
        for _ in range(2):
            self.processes.append(self._start("rpc_server", free_port(), "--tracker", address, "--key", KEY))
        self._until(lambda: self.count() == 2)

    def _start(self, module: str, port: int, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tvm.exec.{module}", "--host=127.0.0.1", f"--port={port}", *more]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, f"--port-end={port + 1}"], start_new_session=True, **quiet)  # type: ignore[call-overload, no-any-return]

    def _listens(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(self.tracker) == 0

    def count(self) -> int:
        try:
            return servers(self.tracker, KEY)
        except EnvironmentProblem:
            return 0

    def _until(self, ready: object) -> None:
        deadline = time.monotonic() + 180
        while not ready():  # type: ignore[operator]
            assert time.monotonic() < deadline, "the pool did not start"
            time.sleep(0.2)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def pool() -> Iterator[Pool]:
    p = Pool()
    yield p
    for process in p.processes:
        p.kill(process)


def test_two_servers_and_one_that_dies(pool: Pool) -> None:
    t = task(conv_site())
    candidates = list(t.site.space(t.target))[1:13]
    options = Options(tracker=pool.tracker, rpc_key=KEY)
    with Measurer(options, Protocol(rounds=3, seconds=1e-4), workers=2) as m:
        outcomes = m.measure(t, candidates[:4])
        assert [o.error for o in outcomes] == [""] * 4 and all(o.median and o.reference for o in outcomes)
        assert all(w.process is not None for w in m.workers), "both servers took part"
        # Long trials, so that one is under way when its server dies.
        killer = threading.Timer(3.0, pool.kill, [pool.processes[2]])
        killer.start()
        outcomes = m.measure(t, candidates[4:], Protocol(rounds=300, seconds=0.05))
        killer.join()
        assert sum(bool(o.error) for o in outcomes) == 1, [o.error for o in outcomes]
        assert [o.knobs for o in outcomes] == candidates[4:] and pool.count() == 1
        assert not m.measure(t, candidates[:1])[0].error, "the other server goes on"
        pool.kill(pool.processes[1])
        with pytest.raises(EnvironmentProblem, match="no server with key"):
            m.measure(t, candidates[:1])


def test_the_command_line_on_a_pool(pool: Pool, tmp_path: Path) -> None:
    onnx.save(model(), str(tmp_path / "two.onnx"))
    address = f"{pool.tracker[0]}:{pool.tracker[1]}"
    command = [sys.executable, "-m", "skimtvm", "tune", str(tmp_path / "two.onnx"), "--log", str(tmp_path / "log")]
    command += ["--trials", "4", "--search", "random", "--rpc-tracker", address, "--rpc-key", KEY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0 and "2 of 2 workloads tuned" in done.stdout, done.stderr
    records = Log.read(tmp_path / "log").records
    assert sum(r.kind == "trial" for r in records) == 8 and not any(r.error for r in records)
    wrong = subprocess.run([*command[:-1], "other"], capture_output=True, text=True, check=False, timeout=300)
    assert wrong.returncode == 8 and "no server with key 'other'" in wrong.stderr and "Traceback" not in wrong.stderr
