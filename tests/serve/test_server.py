"""The server as a process: the public client, limits, overload, workers that stop or die, the end. Nothing is timed:
a worker that is stopped by a signal stands for one that is slow."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from skimtvm.serve.load_client import NoAnswer, malformed, post
from skimtvm.serve.pool import worker_environment

from .helpers import environment

INFER = "/v2/models/served/infer"


def feeds(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, 3, 8, 8)).astype("float32"), "mask": rng.integers(-9, 9, (rows, 4))}


def close(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and np.allclose(got, want, rtol=1e-4, atol=1e-5)


def error(answer):
    """The message of an error, which is JSON like everything else."""
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)["error"]


# ---- the protocol, with its public client ------------------------------------------------------------------------


@pytest.fixture
def triton(server):
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = http.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield http, client
    client.close()


def test_health_and_metadata(triton):
    _, client = triton
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("served")
    assert client.is_model_ready("served", "1")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    meta = client.get_model_metadata("served")
    assert meta["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]},
        {"name": "mask", "datatype": "INT64", "shape": [-1, 4]},
    ]
    assert [(o["name"], o["shape"]) for o in meta["outputs"]] == [("y", [-1, 5]), ("sum", [-1, 4])]


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference(triton, reference, rows, binary_in, binary_out):
    http, client = triton
    arrays = feeds(rows, rows)
    inputs = []
    for name, datatype in (("x", "FP32"), ("mask", "INT64")):
        inputs.append(http.InferInput(name, arrays[name].shape, datatype))
        inputs[-1].set_data_from_numpy(arrays[name], binary_data=binary_in)
    outputs = [http.InferRequestedOutput(name, binary_data=binary_out) for name in ("sum", "y")]
    result = client.infer("served", inputs, outputs=outputs, request_id="17", model_version="1")
    want = reference(arrays)
    assert close(result.as_numpy("y"), want["y"]) and close(result.as_numpy("sum"), want["sum"])
    answer = result.get_response()
    assert (answer["id"], answer["model_name"]) == ("17", "served")
    assert [o["name"] for o in answer["outputs"]] == ["sum", "y"]
    only = client.infer("served", inputs, outputs=outputs[:1])
    assert only.as_numpy("y") is None and close(only.as_numpy("sum"), want["sum"])


def test_the_client_sees_errors(triton):
    http, client = triton
    item = http.InferInput("x", [1, 3, 8, 8], "FP32")
    item.set_data_from_numpy(np.zeros((1, 3, 8, 8), "float32"))
    with pytest.raises(http.InferenceServerException, match="'mask' is missing"):
        client.infer("served", [item])
    with pytest.raises(http.InferenceServerException, match="'other' is unknown"):
        client.infer("other", [item])


def test_requests_that_arrive_together_get_their_own_answers(server, valid):
    def ask(k):
        samples = [(k + i) % 8 for i in range(1 + k % 4)]
        return valid.is_right(server.exchange(valid.request(samples, binary=k % 3 > 0)), samples)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(ask, range(64)))


@pytest.mark.parametrize("index", range(21))
def test_malformed(server, valid, index):
    case = malformed(valid, server.record["max_request_bytes"])[index]
    try:
        answer = server.exchange(case.data) if case.statuses else None
    except NoAnswer:
        assert case.reset
    else:
        assert answer is None or (
            answer.status in case.statuses and (case.name in ("no HTTP", "endless header") or error(answer))
        )
    assert valid.is_right(server.exchange(valid.request([3], binary=True)), [3])


def test_the_list_of_malformed_requests_is_tested_whole(valid):
    assert len(malformed(valid, 1)) == 21


def test_unknown_paths_and_methods(server):
    assert error(server.get("/v2/nothing")) == "Not Found" and server.get("/v2/nothing").status == 404
    assert server.get("/v2/models/other").status == 404 and server.get(INFER).status == 405


def test_chunked_body_beyond_the_limit(server):
    piece = b"%x\r\n%s\r\n" % (1 << 15, b" " * (1 << 15))
    count = server.record["max_request_bytes"] // (1 << 15) + 1
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    answer = server.exchange(head + piece * count + b"0\r\n\r\n")
    assert answer.status == 413 and "limit" in error(answer)


def test_random_bytes_on_the_socket(server, valid):
    """Bounded fuzzing of the whole path: requests with bytes changed, dropped and repeated, and plain noise."""
    rng = random.Random(0)
    good = [valid.request([1], binary=True), valid.request([2], binary=False), b"GET /v2 HTTP/1.1\r\n\r\n"]
    for _ in range(150):
        data = bytearray(rng.choice(good)) if rng.random() < 0.8 else bytearray(rng.randbytes(rng.randint(1, 400)))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(data), 400))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                while connection.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass
    assert valid.is_right(server.exchange(valid.request([3], binary=True)), [3])
    metrics = server.wait_until(lambda m: m["skimtvm_admitted_requests"] == 0)
    assert metrics["skimtvm_queue_requests"] == 0 and metrics["skimtvm_worker_restarts"] == 0
    assert metrics.get('skimtvm_requests_total{status="500"}', 0) == 0
    assert not [r for r in server.records() if "traceback" in r]


def test_metrics_and_logs(server, valid):
    before = server.metrics()
    assert server.exchange(valid.request([0, 1], binary=True)).status == 200
    after = server.metrics()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('skimtvm_requests_total{status="200"}') == 1
    assert grown("skimtvm_batch_rows_sum") == 2 and grown("skimtvm_batch_seconds_count") == 1
    assert after["skimtvm_workers_ready"] == 1 and after["skimtvm_admitted_requests"] == 0
    record = next(r for r in reversed(server.records("request")) if r["path"] == INFER)
    assert (record["level"], record["method"], record["status"]) == ("info", "POST", 200)


# ---- more than it can do -----------------------------------------------------------------------------------------


class Background:
    """Requests under way in threads of their own."""

    def __init__(self, server, valid):
        self.server, self.valid, self.answers = server, valid, {}
        self.threads = []

    def ask(self, *samples):
        def run():
            self.answers[samples] = self.server.exchange(self.valid.request(samples, binary=True))

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join(60)
        return {samples: answer.status for samples, answer in self.answers.items()}

    def right(self):
        return all(self.valid.is_right(a, samples) for samples, a in self.answers.items() if a.status == 200)


def test_full_queue_answers_503_and_drains(serve, valid):
    """Places: queue 3 and one batch of 4."""
    server = serve("--queue", "3", "--workers", "1", "--max-batch-delay", "0")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    background = Background(server, valid)
    for k in range(7):
        background.ask(k)
    server.wait_until(lambda m: m["skimtvm_admitted_requests"] == 7)
    for binary in (True, False):
        refused = server.exchange(valid.request([0], binary=binary))
        assert refused.status == 503 and refused.headers["retry-after"] == "1" and "7 places" in error(refused)
    assert server.get("/v2/health/live").status == 200
    # Told to stop, it answers what it has taken, and nothing else.
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    os.kill(worker, signal.SIGCONT)
    assert background.join() == {(k,): 200 for k in range(7)} and background.right()
    assert server.process.wait(60) == 0
    with pytest.raises(NoAnswer):
        server.get("/v2/health/live")
    assert server.records()[-1]["event"] == "stopped"
    assert not os.path.exists(f"/proc/{worker}")


def test_a_killed_worker_is_replaced_and_its_requests_are_answered(serve, valid):
    server = serve("--workers", "2", "--threads", "1", "--max-batch-delay", "0")
    workers = server.workers()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    background = Background(server, valid)
    for k in range(8):
        background.ask(k)
    server.wait_until(lambda m: m["skimtvm_admitted_requests"] == 8)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert background.join() == {(k,): 200 for k in range(8)} and background.right()
    metrics = server.wait_until(lambda m: m["skimtvm_workers_ready"] == 2)
    assert metrics["skimtvm_worker_restarts"] == 2 and not set(server.workers()) & set(workers)
    assert [r["ending"] for r in server.records("worker died")] == ["signal 9"] * 2
    # Workers do not outlive the front, however it ends.
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
    ],
)
def test_workers_ask_for_huge_pages(monkeypatch, given, got):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert worker_environment()["GLIBC_TUNABLES"] == got


def test_time_limit(serve, valid):
    """A worker that hangs: 504 for what it runs, 503 for what waits; then it is killed and replaced."""
    server = serve("--timeout", "1.5", "--workers", "1", "--max-batch-delay", "0")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    background = Background(server, valid)
    background.ask(1)
    background.ask(2)
    # A body that never comes ends in 408.
    slow = server.exchange(f"POST {INFER} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n".encode())
    assert slow.status == 408 and "did not arrive" in error(slow)
    assert sorted(background.join().values()) == [503, 504]
    assert server.metrics()["skimtvm_queue_requests"] == 0
    server.wait_for("worker is stuck and is killed")
    server.wait_until(lambda m: m["skimtvm_worker_restarts"] == 1 and m["skimtvm_workers_ready"] == 1)
    assert valid.is_right(server.exchange(valid.request([5], binary=True)), [5])


def test_a_client_that_leaves_frees_its_place(serve, valid):
    server = serve("--workers", "1", "--max-batch-delay", "60000")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(valid.request([1], binary=True))
        server.wait_until(lambda m: m["skimtvm_queue_requests"] == 1)
    metrics = server.wait_until(lambda m: m["skimtvm_admitted_requests"] == 0)
    assert metrics["skimtvm_queue_requests"] == 0


def test_ready_only_while_a_worker_is(serve, served):
    server = serve("--workers", "1")
    assert server.get("/v2/health/ready").status == 200
    content = served.read_bytes()
    moved = served.with_name("moved.so")
    served.rename(moved)  # the replacement cannot load it
    try:
        os.kill(server.workers()[0], signal.SIGKILL)
        assert "cannot be read" in server.wait_for("worker cannot be replaced")["reason"]
        assert server.get("/v2/health/ready").status == 503 and server.get("/v2/models/served/ready").status == 503
        refused = server.exchange(post(INFER, b"{}"))
        assert refused.status == 503 and "no worker" in error(refused)
        assert server.get("/v2/health/live").status == 200
    finally:
        moved.rename(served)
    server.wait_until(lambda m: m["skimtvm_workers_ready"] == 1)
    assert server.get("/v2/health/ready").status == 200 and served.read_bytes() == content


# ---- what keeps it from starting ---------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, "-m", "skimtvm", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1 and lines[0].startswith("skimtvm: error: "), done.stderr
    return done.returncode, lines[0]


def test_startup_errors_are_one_line(served, tmp_path):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(served.read_bytes()[:-100])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ((tmp_path / "none.so",), 6, "cannot be read"),
            ((damaged,), 6, "truncated"),
            ((served, "--port", port), 8, f"port {port}: Address already in use"),
            ((served, "--threads", "1000"), 2, "CPUs only"),
            ((served, "--name", "a/b"), 2, "slash"),
            ((served, "--queue", "0"), 2, "--queue"),
        ]
        for arguments, code, text in cases:
            got, line = start(*arguments, *([] if "--port" in arguments else ["--port", "0"]))
            assert got == code and text in line, line


def test_without_the_extra(served):
    text = "import sys; sys.modules['uvicorn'] = None; sys.argv[0] = 'skimtvm'; from skimtvm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", text, "serve", str(served)],
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 8 and "pip install 'skimtvm[serve]'" in done.stderr and done.stderr.count("\n") == 1


def test_terminated_while_it_starts(served, tmp_path):
    command = [sys.executable, "-m", "skimtvm", "serve", str(served), "--port", "0"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, stderr=log, env=environment())
        time.sleep(1.0)
        process.terminate()
        assert process.wait(60) in (0, 143)  # 143: the signal came before anything was started
        log.seek(0)
        assert "Traceback" not in log.read()
