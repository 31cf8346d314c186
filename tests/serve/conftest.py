"""Fixtures: a module with two inputs and batch 4, and servers as users start them."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import environment

pytest.importorskip("uvicorn", reason="serving needs the extra 'serve'")

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "served.onnx"
    subprocess.run([sys.executable, str(HERE / "model.py"), str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def served(onnx_file):
    """The module, batch 4."""
    path = onnx_file.with_suffix(".so")
    command = [sys.executable, "-m", "skimtvm", "compile", str(onnx_file), "-o", str(path), "--batch", "4", "--quiet"]
    subprocess.run(command, check=True, env=environment())
    return path


@pytest.fixture(scope="session")
def reference(onnx_file):
    """Right outputs by name for feeds of any number of rows: ONNX Runtime's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    return lambda feeds: dict(zip(["y", "sum"], session.run(["y", "sum"], feeds), strict=True))


class Server:
    """``skimtvm serve`` in a process of its own."""

    def __init__(self, log, *arguments):
        self.log = log
        command = [sys.executable, "-m", "skimtvm", "serve", *map(str, arguments), "--port", "0"]
        with open(log, "wb") as f:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=environment())
        record = self.wait_for("listening")
        self.url, self.record = record["url"], record
        self.host, self.port = "127.0.0.1", int(self.url.rsplit(":", 1)[1])

    def records(self, event=None):
        """The records of the log; every line must be one."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [r for r in lines if event in (None, r["event"])]

    def wait_for(self, event, count=1, limit=120):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            with contextlib.suppress(ValueError):  # a line that is being written
                found = self.records(event)
                if len(found) >= count:
                    return found[count - 1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in {self.log.read_text()}")

    def exchange(self, data):
        """One answer to raw bytes, on a connection of its own."""
        from skimtvm.serve.load_client import Connection

        async def run():
            connection = Connection(self.host, self.port)
            try:
                return await asyncio.wait_for(connection.exchange(data), 60)
            finally:
                await connection.close()

        return asyncio.run(run())

    def get(self, path):
        return self.exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def metrics(self):
        lines = self.get("/metrics").body.decode().splitlines()
        return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

    def wait_until(self, condition, limit=60):
        end = time.monotonic() + limit
        while not condition(metrics := self.metrics()):
            assert time.monotonic() < end, metrics
            time.sleep(0.02)
        return metrics

    def workers(self):
        return [int(k.split('pid="')[1].split('"')[0]) for k in self.metrics() if "worker_resident_bytes{" in k]

    def stop(self, limit=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit)

    def end(self):
        if self.process.poll() is None:
            try:
                self.stop(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def serve(served, tmp_path):
    """Start a server of the module with the given options; it ends with the test."""
    servers = []

    def start(*arguments, model=served):
        servers.append(Server(tmp_path / f"{len(servers)}.log", model, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    """One server for tests that leave it as it was."""
    server = Server(tmp_path_factory.mktemp("log") / "log", served, "--workers", "1", "--timeout", "20")
    yield server
    server.end()


@pytest.fixture(scope="session")
def valid(served):
    """Valid requests with known answers, in a process that has the compiler too."""
    import tvm  # noqa: F401  the whole of it: loading a module first would leave this process without the compiler

    from skimtvm.serve.engines import describe, open_engine
    from skimtvm.serve.load_client import Valid

    engine = open_engine("skimtvm", served, 1)
    signature, warning = describe(engine, served.stem)
    assert warning is None and signature.row_axis and signature.batches == (4,)
    return Valid(engine, signature)
