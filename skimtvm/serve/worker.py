"""A worker process: loads the model once, on CPUs of its own, and runs the batches that the front puts into shared memory.

The front starts ``python -m skimtvm.serve.worker FD``. FD is a SOCK_SEQPACKET socket: the front sends a Config as JSON, the
worker answers with HELLO and the shared memory as a file descriptor, or with what went wrong; after that each message
is one TASK or one RESULT. The worker ends when the front closes the socket or dies.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

from .. import _torch
from ..errors import InternalError, SkimError
from .engines import Engine, describe, open_engine
from .signature import Signature, Slot, slot_bytes

TASK = struct.Struct("<II")  # slot, batch size
RESULT = struct.Struct("<IId")  # slot, 0 or 1 for an error whose text follows, seconds
MAX_MESSAGE = 1 << 16


@dataclass(frozen=True)
class Config:
    """What a worker is to serve, on which CPUs, with how many threads and how many batches in shared memory."""

    engine: str
    path: str
    name: str
    threads: int
    cpus: tuple[int, ...]
    slots: int

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> Config:
        raw = json.loads(text)
        return Config(**(raw | {"cpus": tuple(raw["cpus"])}))


@dataclass(frozen=True)
class Hello:
    """A worker's first message. ``warning``: why requests do not share batches, if the module has room for that.
    ``seconds``: one run of the largest batch."""

    signature: Signature
    seconds: float
    warning: str | None

    def to_json(self) -> bytes:
        raw = {"signature": self.signature.to_json(), "seconds": self.seconds, "warning": self.warning}
        return json.dumps(raw).encode()


def read_hello(message: bytes) -> Hello:
    """The worker's first message. Raises the SkimError that it reports instead, or InternalError."""
    try:
        raw: dict[str, Any] = json.loads(message)
        if "error" not in raw:
            return Hello(Signature.from_json(raw["signature"]), raw["seconds"], raw["warning"])
    except (ValueError, KeyError, TypeError):
        raise InternalError(f"a worker's first message cannot be read ({message[:80]!r})") from None
    error = type("WorkerError", (SkimError,), {"exit_code": int(raw["exit_code"])})
    raise error(str(raw["error"]))


def main(connection: socket.socket) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the front, which drains first and then lets go
        signal.signal(number, signal.SIG_IGN)
    _torch.own_process()
    config = Config.from_json(connection.recv(MAX_MESSAGE))
    os.sched_setaffinity(0, config.cpus)
    try:
        engine = open_engine(config.engine, config.path, config.threads)
        signature, warning = describe(engine, config.name)
        size = slot_bytes(signature)
        memory = os.memfd_create("skimtvm-serve", os.MFD_CLOEXEC)
        os.ftruncate(memory, size * config.slots)
        view = memoryview(mmap.mmap(memory, size * config.slots))
        slots = [Slot(signature, view[k * size : (k + 1) * size]) for k in range(config.slots)]
        _, _, seconds = run(engine, slots[0], signature.capacity)
    except SkimError as e:
        connection.send(_failure(e, e.exit_code))
        return e.exit_code
    except (MemoryError, OSError) as e:
        connection.send(_failure(e, 1))
        return 1
    socket.send_fds(connection, [Hello(signature, seconds, warning).to_json()], [memory])
    os.close(memory)
    while message := connection.recv(MAX_MESSAGE):
        slot, batch = TASK.unpack(message)
        failed, text, seconds = run(engine, slots[slot], batch)
        try:
            connection.send(RESULT.pack(slot, failed, seconds) + text)
        except BrokenPipeError:
            break
    return 0


def run(engine: Engine, slot: Slot, batch: int) -> tuple[int, bytes, float]:
    """Run one batch in place: 0 or 1 for success or failure, the failure's text, seconds."""
    start = time.perf_counter()
    try:
        feeds = dict(zip([s.name for s in slot.signature.inputs], slot.inputs(batch), strict=True))
        outputs = engine.run(feeds)
        for spec, target in zip(slot.signature.outputs, slot.outputs(batch), strict=True):
            target[...] = outputs[spec.name]
    except Exception as e:  # a request must not end the worker; the front reports it
        text = f"{type(e).__name__}: {' '.join(str(e).split())}"
        return 1, text.encode()[:1000], time.perf_counter() - start
    return 0, b"", time.perf_counter() - start


def _failure(error: BaseException, exit_code: int) -> bytes:
    text = " ".join(str(error).split()) or type(error).__name__
    return json.dumps({"error": text[:10000], "exit_code": exit_code}).encode()


def receive_hello(connection: socket.socket) -> tuple[bytes, int | None]:
    """The first message and the descriptor that came with it; (b"", None) if the worker has ended."""
    message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 1)
    return message, descriptors[0] if descriptors else None


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
