"""DeepSparse as a child process: its last release needs another NumPy than we do."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .engines import Case, Unavailable

WORKER = Path(__file__).parent / "deepsparse_worker.py"
TIMEOUT = 900.0  # seconds for one answer: loading VGG takes a minute on a slow machine


class DeepSparse:
    """One persistent child for one model. It times its own runs, so that the pipe does not count, and sleeps between
    them. The engine pins its threads as it likes (NM_BIND_THREADS_TO_CORES as the user set it)."""

    name: ClassVar[str] = "deepsparse"

    def __init__(self, case: Case, python: Path | None) -> None:
        if python is None:
            raise Unavailable("not measured: give --deepsparse-python")
        self._folder = tempfile.TemporaryDirectory(prefix="skimtvm-deepsparse-")
        self._work = Path(self._folder.name)
        self._child: subprocess.Popen[bytes] | None = None
        self._rest = b""
        try:
            self._start(python)
            files = []
            for i, array in enumerate(case.feeds.values()):
                files.append(str(self._work / f"input{i}.npy"))
                np.save(files[-1], array)
            model = str(case.model.resolve())
            answer = self._ask(do="load", model=model, inputs=files, batch=case.batch, threads=case.threads)
            self.version = str(answer["version"])
        except BaseException:
            self.close()
            raise

    def _start(self, python: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        self._log = open(self._work / "log.txt", "wb")  # noqa: SIM115 (lives as long as the child)
        try:
            self._child = subprocess.Popen(
                [os.path.abspath(python), "-u", str(WORKER)],  # not resolved: the link's place makes the environment
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                cwd=self._work,
            )
        except OSError as e:
            raise Unavailable(f"cannot start '{python}': {e.strerror}") from None

    def _ask(self, **request: Any) -> dict[str, Any]:
        child = self._child
        assert child is not None and child.stdin is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        except OSError:
            pass  # the end of the child shows when its answer is read
        answer: dict[str, Any] = json.loads(self._line(str(request["do"])))
        if "error" in answer:
            text = str(answer["error"]).strip().splitlines()[0][:160]
            if text.startswith("ModuleNotFoundError"):
                text = f"not installed there: {text}"
            raise Unavailable(text)
        return answer

    def _line(self, what: str) -> bytes:
        """The next line from the child. Raises Unavailable if it ends or takes too long."""
        assert self._child is not None and self._child.stdout is not None
        stream = self._child.stdout.fileno()
        end = time.monotonic() + TIMEOUT
        while b"\n" not in self._rest:
            ready, _, _ = select.select([stream], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise Unavailable(f"no answer to '{what}' within {TIMEOUT:.0f} s")
            data = os.read(stream, 1 << 16)
            if not data:
                raise Unavailable(f"its process ended on '{what}': {self._last_words()}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        lines = (self._work / "log.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:160] if lines else "without a message"

    def seconds(self, calls: int) -> float:
        return float(np.mean(self._ask(do="run", calls=calls)["seconds"]))

    def outputs(self) -> list[np.ndarray]:
        file = self._work / "outputs.npz"
        count = self._ask(do="outputs", file=str(file))["count"]
        with np.load(file) as arrays:
            return [arrays[f"arr_{i}"] for i in range(count)]

    def kernel_seconds(self, calls: int) -> list[float]:
        return []

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()  # the end of stdin ends the worker
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            self._log.close()
        self._folder.cleanup()
