"""Requests to load a server with, valid and malformed, and a small HTTP client that loses none of them silently."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from .engines import Engine
from .protocol import HEADER_LENGTH
from .signature import DATATYPES, Signature

_MAX_IDLE = 20.0  # seconds, well below the server's: it may close a connection while a request is on its way
_TOLERANCE = 1e-4  # of the largest value


class NoAnswer(Exception):
    """The connection ended before a whole answer came."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Malformed:
    """Bytes that are no valid request, and the statuses that are right for them; none if no answer is due.

    ``reset``: the server may hang up with bytes unread, and TCP then may drop its answer.
    """

    name: str
    data: bytes
    statuses: frozenset[int]
    reset: bool = False


class Connection:
    """One HTTP/1.1 connection, opened when needed and again after it was closed."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0

    async def exchange(self, data: bytes) -> Answer:
        """Send ``data`` and read one answer. Raises NoAnswer."""
        if time.monotonic() - self._used > _MAX_IDLE:
            await self.close()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port)
            reader, writer = self._streams
            writer.write(data)
            answer = await _read_answer(reader)
            self._used = time.monotonic()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as e:
            await self.close()
            raise NoAnswer(f"{type(e).__name__}: {e}") from None
        except BaseException:
            await self.close()
            raise
        if answer.headers.get("connection", "").lower() == "close":
            await self.close()
        return answer

    async def send_only(self, data: bytes) -> None:
        """Send ``data`` and hang up."""
        with contextlib.suppress(OSError):
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port)
            self._streams[1].write(data)
            await self._streams[1].drain()
        await self.close()

    async def close(self) -> None:
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()


async def _read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("content-length") is not None:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return Answer(int(first.split()[1]), headers, body)


def post(path: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a POST; ``_`` in a header's name stands for ``-``."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Valid:
    """Valid requests with known answers: ``count`` random samples, one after the other or several in one request."""

    def __init__(self, engine: Engine, signature: Signature, count: int = 8) -> None:
        self.signature = signature
        self.path = f"/v2/models/{signature.name}/infer"
        rng = np.random.default_rng(5)
        batch = signature.capacity
        self._feeds: list[list[np.ndarray]] = []  # of one row each
        self._expected: list[list[np.ndarray]] = []
        for _ in range(count):
            feeds = [_random(signature.shape(s, 1), s.dtype, rng) for s in signature.inputs]
            filled = {
                s.name: np.repeat(f, batch, axis=0) if signature.row_axis else f
                for s, f in zip(signature.inputs, feeds, strict=True)
            }
            outputs = engine.run(filled)
            self._feeds.append(feeds)
            arrays = [np.array(outputs[s.name]) for s in signature.outputs]
            self._expected.append([a[:1] if signature.row_axis else a for a in arrays])

    def request(self, samples: Sequence[int], *, binary: bool) -> bytes:
        """A request of one row for each of ``samples``, with inputs and outputs as raw bytes or as JSON."""
        inputs, blobs = [], []
        for k, spec in enumerate(self.signature.inputs):
            array = self._join([self._feeds[i][k] for i in samples])
            entry: dict[str, Any] = {"name": spec.name, "shape": list(array.shape), "datatype": DATATYPES[spec.dtype]}
            if binary:
                blobs.append(array.tobytes())
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                entry["data"] = array.reshape(-1)
            inputs.append(entry)
        root = {"inputs": inputs, "parameters": {"binary_data_output": binary}}
        text = orjson.dumps(root, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = {HEADER_LENGTH: str(len(text))} if binary else {}
        return post(self.path, b"".join([text, *blobs]), **headers)

    def is_right(self, answer: Answer, samples: Sequence[int]) -> bool:
        """Whether the numbers of ``answer`` are those of ``samples``."""
        at = int(answer.headers.get(HEADER_LENGTH, len(answer.body)))
        outputs = json.loads(answer.body[:at])["outputs"]
        if [o["name"] for o in outputs] != [s.name for s in self.signature.outputs]:
            return False
        for k, (spec, output) in enumerate(zip(self.signature.outputs, outputs, strict=True)):
            want = self._join([self._expected[i][k] for i in samples])
            dtype = np.dtype(spec.dtype)
            if "data" in output:
                got = np.array(output["data"], dtype)
            else:
                got = np.frombuffer(answer.body, dtype, want.size, at)
                at += got.nbytes
            scale = float(np.abs(want.astype(np.float64)).max(initial=0))
            if output["shape"] != list(want.shape) or not np.allclose(
                got, want.reshape(-1), rtol=0, atol=_TOLERANCE * scale, equal_nan=True
            ):
                return False
        return True

    def _join(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows) if self.signature.row_axis else rows[0]


def _random(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def malformed(valid: Valid, limit: int) -> list[Malformed]:
    """One of each kind; ``limit``: the server's limit for the size of a request."""
    path, spec = valid.path, valid.signature.inputs[0]
    good = {"name": spec.name, "shape": list(valid.signature.shape(spec, 1)), "datatype": DATATYPES[spec.dtype]}

    def body(**changes: object) -> bytes:
        return post(path, orjson.dumps({"inputs": [good | {"data": [0]} | changes]}))

    whole = valid.request([0], binary=True)
    bad = frozenset({400})
    return [
        Malformed("no JSON", post(path, b"\xff{]"), bad),
        Malformed("empty body", post(path, b""), bad),
        Malformed("JSON of another kind", post(path, b"[1, 2]"), bad),
        Malformed("deep JSON", post(path, b"[" * 20000), bad),
        Malformed("too few values", body(shape=good["shape"], data=[]), bad),
        Malformed("ragged data", body(data=[[1], 2, [[3]]]), bad),
        Malformed("strings for numbers", body(data=["1", "2"]), bad),
        Malformed("wrong shape", body(shape=[-1, 2**62, 3]), bad),
        Malformed("wrong datatype", body(datatype="BYTES"), bad),
        Malformed("unknown input", body(name="\u0000no such input"), bad),
        Malformed("binary size beyond the body", body(parameters={"binary_data_size": 2**40}), bad),
        Malformed("header length beyond the body", post(path, b"{}", Inference_Header_Content_Length="99"), bad),
        Malformed("header length no number", post(path, b"{}", Inference_Header_Content_Length="-1"), bad),
        Malformed("compressed", post(path, b"{}", Content_Encoding="gzip"), frozenset({415})),
        Malformed("unknown model", post("/v2/models/none/infer", b"{}"), frozenset({404})),
        Malformed("unknown version", post(f"{path[:-6]}/versions/2/infer", b"{}"), frozenset({404})),
        Malformed("wrong method", f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), frozenset({405})),
        Malformed("no HTTP", b"\x16\x03\x01\x00\xa5\x01\r\n\r\n\r\n", bad, reset=True),
        Malformed("endless header", b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, bad, reset=True),
        Malformed("too large", post(path, b"x" * (limit + 1)), frozenset({413})),
        Malformed("cut off", whole[: len(whole) - 1], frozenset()),
    ]
