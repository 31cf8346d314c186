"""Load a server of its own on this machine with more than it can do, and count what becomes of each request.

``python -m skimtvm.serve.load MODEL.so --minutes 30 --output load.json`` starts ``skimtvm serve`` on the loopback
interface, measures its capacity, then offers a multiple of it: valid requests, binary and JSON, with known answers, and
malformed ones. It kills a worker now and then, watches memory, stops by itself, and exits with 1 unless every valid
request was answered right or refused with 503 and every malformed one was refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engines import NAMES, describe, open_engine
from .load_client import Connection, Malformed, NoAnswer, Valid, malformed
from .metrics import resident_bytes
from .pool import child_environment

MALFORMED_SHARE = 0.2
JSON_SHARE = 0.1  # of the valid requests
_TICK = 0.005  # seconds between two looks at which requests are due
_MAX_MINUTES = 24 * 60


@dataclass
class Counts:
    """What became of the requests that were sent."""

    sent: int = 0
    right: int = 0
    refused: int = 0  # with 503
    wrong: list[str] = field(default_factory=list)  # wrong numbers
    other: Counter[str] = field(default_factory=Counter)  # any other status, or no answer
    other_at: list[str] = field(default_factory=list)  # when, and after how long
    longest_stall: float = 0.0  # seconds in which this process itself did not get to run
    malformed_sent: int = 0
    malformed_refused: Counter[str] = field(default_factory=Counter)  # by kind, refused as it should be
    malformed_other: Counter[str] = field(default_factory=Counter)
    late: int = 0  # due, but not sent, since all connections were in use
    rows: int = 0  # in right answers
    seconds: list[float] = field(default_factory=list)  # of right answers

    def as_dict(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "sent": self.sent,
            "right": self.right,
            "refused_503": self.refused,
            "wrong": len(self.wrong),
            "wrong_examples": self.wrong[:10],
            "lost_or_other": dict(self.other),
            "lost_or_other_examples": self.other_at[:30],
            "longest_stall_of_client_s": round(self.longest_stall, 2),
            "unanswered": self.sent - self.right - self.refused - len(self.wrong) - self.other.total(),
            "malformed_sent": self.malformed_sent,
            "malformed_refused": dict(self.malformed_refused),
            "malformed_other": dict(self.malformed_other),
            "not_sent_for_lack_of_connections": self.late,
            "rows": self.rows,
            "p50_ms": _quantile(ordered, 0.5),
            "p99_ms": _quantile(ordered, 0.99),
        }


def _quantile(ordered: list[float], q: float) -> float | None:
    return round(1e3 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 2) if ordered else None


class Server:
    """``skimtvm serve`` as a child process; its log goes to ``log``."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "skimtvm", "serve", *arguments, "--port", "0", "--no-access-log"]
        with open(log, "wb") as f:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=child_environment()
            )

    def wait(self, limit: float = 300.0) -> dict[str, Any]:
        """The record of the log that says where it listens."""
        end = time.monotonic() + limit
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.log.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    record: dict[str, Any] = json.loads(line)
                    if record.get("event") == "listening":
                        return record
            time.sleep(0.1)
        raise SystemExit(f"the server did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def stop(self, limit: float = 60.0) -> int:
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -9


class Load:
    """Offers requests to the server at ``host:port`` and counts."""

    def __init__(self, host: str, port: int, valid: Valid, limit: int, connections: int, answer_limit: float) -> None:
        self.host, self.port, self.valid, self.answer_limit = host, port, valid, answer_limit
        self.idle = [Connection(host, port) for _ in range(connections)]
        self.random = random.Random(3)
        self.bad = malformed(valid, limit)
        self.counts = Counts()
        self.start = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._bodies: dict[tuple[tuple[int, ...], bool], bytes] = {}

    async def capacity(self, seconds: float, connections: int) -> float:
        """Right answers a second to valid requests, with so many always under way."""
        before, start = self.counts.right, time.monotonic()

        async def client() -> None:
            while time.monotonic() < start + seconds:
                await self._valid(connection := self.idle.pop())
                self.idle.append(connection)

        await asyncio.gather(*(client() for _ in range(connections)))
        return (self.counts.right - before) / (time.monotonic() - start)

    async def offer(self, rate: float, seconds: float) -> None:
        """``rate`` requests a second for ``seconds``, whatever becomes of them, and then wait for all of them."""
        start = self.start = time.monotonic()
        offered, last = 0, 0.0
        while (now := time.monotonic() - start) < seconds:
            self.counts.longest_stall, last = max(self.counts.longest_stall, now - last - _TICK), now
            due = int(now * rate) - offered
            offered += due
            for _ in range(due):
                if not self.idle:
                    self.counts.late += 1
                    continue
                task = asyncio.create_task(self._one(self.idle.pop()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(_TICK)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * self.answer_limit)

    async def close(self) -> None:
        for connection in self.idle:
            await connection.close()

    async def _one(self, connection: Connection) -> None:
        if self.random.random() < MALFORMED_SHARE:
            await self._malformed(connection, self.random.choice(self.bad))
        else:
            await self._valid(connection)
        self.idle.append(connection)

    async def _valid(self, connection: Connection) -> None:
        counts, capacity = self.counts, self.valid.signature.capacity
        # Mostly single rows; sometimes several, up to what fits.
        rows = 1 if self.random.random() < 0.8 else self.random.randint(1, capacity)
        samples = tuple((self.random.randrange(8) + k) % 8 for k in range(rows))
        key = samples, self.random.random() >= JSON_SHARE
        if len(self._bodies) > 64:
            self._bodies.clear()
        data = self._bodies.get(key) or self._bodies.setdefault(key, self.valid.request(samples, binary=key[1]))
        counts.sent += 1
        start = time.monotonic()
        try:
            answer = await asyncio.wait_for(connection.exchange(data), self.answer_limit)
        except (NoAnswer, TimeoutError) as e:
            self._odd(f"no answer ({str(e) or type(e).__name__})", start)
            return
        if answer.status == 503:
            counts.refused += 1
        elif answer.status != 200:
            self._odd(str(answer.status), start)
        elif self.valid.is_right(answer, samples):
            counts.right += 1
            counts.rows += rows
            counts.seconds.append(time.monotonic() - start)
        else:
            counts.wrong.append(f"samples {samples}, binary {key[1]}")

    def _odd(self, what: str, start: float) -> None:
        now = time.monotonic()
        self.counts.other[what] += 1
        self.counts.other_at.append(f"{what}, {now - self.start:.1f} s into the load, after {now - start:.1f} s")

    async def _malformed(self, connection: Connection, case: Malformed) -> None:
        counts = self.counts
        counts.malformed_sent += 1
        if not case.statuses:
            await connection.send_only(case.data)
            counts.malformed_refused[case.name] += 1
            return
        try:
            answer = await asyncio.wait_for(connection.exchange(case.data), self.answer_limit)
            if answer.status == 503 or answer.status in case.statuses:
                counts.malformed_refused[case.name] += 1
            else:
                counts.malformed_other[f"{case.name}: {answer.status}"] += 1
        except (NoAnswer, TimeoutError) as e:
            if case.reset and isinstance(e, NoAnswer):
                counts.malformed_refused[case.name] += 1
            else:
                counts.malformed_other[f"{case.name}: no answer ({e})"] += 1


class Observer:
    """Samples the memory of the server's processes, and kills a worker when all ``workers`` have been ready for
    ``kill_every`` seconds: a request may meet one death, not two."""

    def __init__(self, front: int, host: str, port: int, workers: int, kill_every: float | None, every: float) -> None:
        self.front, self.count, self.kill_every, self.every = front, workers, kill_every, every
        self.connection = Connection(host, port)
        self.samples: list[dict[str, Any]] = []
        self.kills = 0
        self.restarts = 0.0

    async def run(self) -> None:
        start = ready = time.monotonic()
        while True:
            await asyncio.sleep(self.every)
            with contextlib.suppress(NoAnswer, TimeoutError):
                pids = await self.workers()
                now = time.monotonic()
                sample = {
                    "seconds": round(now - start, 1),
                    "front": resident_bytes(self.front),
                    "workers": [resident_bytes(pid) for pid in pids],
                }
                self.samples.append(sample)
                if len(pids) < self.count:
                    ready = now
                if self.kill_every is not None and now - ready >= self.kill_every:
                    ready = now
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[self.kills % len(pids)], signal.SIGKILL)
                        self.kills += 1

    async def settle(self, workers: int, limit: float = 60.0) -> int:
        """Wait until all workers are ready again; returns how many are."""
        end = time.monotonic() + limit
        ready = 0
        while ready < workers and time.monotonic() < end:
            with contextlib.suppress(NoAnswer, TimeoutError):
                ready = len(await self.workers())
            await asyncio.sleep(0.1)
        return ready

    async def workers(self) -> list[int]:
        """Process ids of the workers that are ready."""
        request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = await asyncio.wait_for(self.connection.exchange(request), 10)
        lines = answer.body.decode().splitlines()
        for line in lines:
            if line.startswith("skimtvm_worker_restarts "):
                self.restarts = float(line.split()[1])
        return [int(l.split('pid="')[1].split('"')[0]) for l in lines if l.startswith("skimtvm_worker_resident_bytes{")]

    def memory(self, workers: int) -> dict[str, Any]:
        """How much the front and the largest worker grew from the second to the last quarter of the time."""
        full = [s for s in self.samples if len(s["workers"]) == workers]
        quarter = len(full) // 4
        if quarter == 0:
            return {}
        early, late = full[quarter : 2 * quarter], full[-quarter:]

        def growth(pick: Any) -> dict[str, float]:
            a, b = (statistics.median(pick(s) for s in part) for part in (early, late))
            return {"early_mb": round(a / 1e6, 1), "late_mb": round(b / 1e6, 1), "growth_mb": round((b - a) / 1e6, 2)}

        return {"front": growth(lambda s: s["front"]), "worker": growth(lambda s: max(s["workers"]))}


async def measure(options: argparse.Namespace, valid: Valid, server: Server) -> dict[str, Any]:
    record = await asyncio.to_thread(server.wait)
    host, port = record["url"].removeprefix("http://").rsplit(":", 1)
    load = Load(host, int(port), valid, record["max_request_bytes"], options.connections, options.timeout + 15)
    busy = min(options.connections, options.workers * valid.signature.capacity * 2)
    warm_up = min(max(options.seconds / 10, 2.0), 10.0)
    await load.capacity(warm_up / 2, busy)
    load.counts = Counts()
    capacity = await load.capacity(warm_up, busy)
    if not capacity:
        raise SystemExit(f"no valid request was answered right: {load.counts.as_dict()}")
    result: dict[str, Any] = {"capacity": {"requests_per_second": round(capacity, 1)} | load.counts.as_dict()}
    load.counts = Counts()
    observer = Observer(
        record["pid"], host, int(port), options.workers, options.kill_every, max(options.seconds / 300, 0.5)
    )
    observing = asyncio.create_task(observer.run())
    start = time.monotonic()
    await load.offer(options.overload * capacity / (1 - MALFORMED_SHARE), options.seconds)
    elapsed = time.monotonic() - start
    observing.cancel()
    await asyncio.sleep(0)
    ready = await observer.settle(options.workers)
    counts = load.counts
    result["overload"] = {
        "factor": options.overload,
        "seconds": round(elapsed, 1),
        "valid_offered_per_second": round(options.overload * capacity, 1),
        "right_per_second": round(counts.right / elapsed, 1),
        "rows_per_second": round(counts.rows / elapsed, 1),
    } | counts.as_dict()
    result["workers_killed"], result["workers_replaced"] = observer.kills, int(observer.restarts)
    result["workers_ready_at_end"] = ready
    result["memory"] = observer.memory(options.workers)
    result["memory_samples"] = observer.samples
    await load.close()
    await observer.connection.close()
    return result


def passed(result: dict[str, Any]) -> bool:
    """Every valid request answered right or refused with 503, every malformed one refused, a clean end."""
    o = result["overload"]
    good = o["right"] > 0 and not (o["wrong"] or o["lost_or_other"] or o["unanswered"] or o["malformed_other"])
    replaced = result["workers_replaced"] >= result["workers_killed"]
    return (
        good
        and replaced
        and result["workers_ready_at_end"] == result["settings"]["workers"]
        and not result["exit_code"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m skimtvm.serve.load", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", choices=NAMES, default="skimtvm")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--overload", type=float, default=2.0, help="offered load as a multiple of the capacity")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=30.0, help="the server's, in seconds")
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument(
        "--kill-every", type=float, help="seconds that all workers are ready before one is killed; never, if not given"
    )
    parser.add_argument("--output", type=Path, help="write the result here (JSON); the server's log goes beside it")
    options = parser.parse_args()
    if not 0 < options.minutes <= _MAX_MINUTES or not 0 < options.overload <= 100 or not 0 < options.connections <= 900:
        parser.error(f"minutes up to {_MAX_MINUTES}, overload up to 100, connections up to 900, all above 0")
    options.seconds = 60 * options.minutes
    output = options.output or Path(f"load-{os.getpid()}.json")
    if output.exists():
        parser.error(f"'{output}' exists; choose another --output")
    engine = open_engine(options.engine, options.model, options.threads)
    signature, _ = describe(engine, options.model.stem)
    valid = Valid(engine, signature)
    del engine
    arguments = [str(options.model), "--engine", options.engine, "--workers", str(options.workers)]
    arguments += ["--threads", str(options.threads), "--timeout", str(options.timeout)]
    server = Server(arguments, output.with_suffix(".log"))
    try:
        result = asyncio.run(measure(options, valid, server))
    finally:
        code = server.stop()
    result["exit_code"] = code
    result["settings"] = {
        "model": options.model.name, "engine": options.engine, "workers": options.workers, "threads": options.threads,
        "batches": signature.batches, "timeout": options.timeout, "connections": options.connections,
        "kill_every": options.kill_every, "cpus": sorted(os.sched_getaffinity(0)),
    }  # fmt: skip
    result["passed"] = passed(result)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, output)
    print(json.dumps({k: v for k, v in result.items() if k != "memory_samples"}, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
