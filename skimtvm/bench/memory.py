"""Peak resident memory of one run, each in a process of its own: our module against ONNX Runtime with the dense model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..profiler import random_feeds
from .engines import save_model
from .networks import Say, compile_to
from .records import OK, OURS, MemoryRow, Terms
from .sparsity import Sparsity

# tvm-ffi imports PyTorch, 200 MB, wherever it happens to be installed; neither engine needs it.
# getrusage's ru_maxrss survives exec: a child of a large process starts with the parent's peak. VmHWM belongs to the new
# program alone.
_PEAK = """
import json, resource, sys
sys.modules["torch"] = None
import numpy as np
def peak():
    try:
        for line in open("/proc/self/status"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, feeds, threads = sys.argv[1], dict(np.load(sys.argv[2])), int(sys.argv[3])
"""
_OURS = """
import skimtvm, skimtvm.tvm_runtime
skimtvm.tvm_runtime.import_tvm()
imported = peak()
skimtvm.load(path, threads=threads).run(feeds)
print(json.dumps([peak(), imported, skimtvm.__version__]))
"""
_ORT = """
import onnxruntime
imported = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
print(json.dumps([peak(), imported, onnxruntime.__version__]))
"""


def measure_memory(
    network: str, sparsity: Sparsity, batch: int, threads: int, *, terms: Terms, say: Say = lambda text: None
) -> list[MemoryRow]:
    """Two rows: our module of the pruned network, ONNX Runtime on the dense one."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="skimtvm-bench-") as folder:
        work = Path(folder)
        say("compile")
        module = compile_to(work / "module.so", sparsity.build(network, batch=batch))
        feeds: dict[str, Any] = random_feeds(module.inputs)
        np.savez(work / "feeds.npz", **feeds)
        dense = Sparsity("none")
        runs = (
            (OURS, sparsity, work / "module.so", _OURS),
            ("onnxruntime", dense, save_model(dense.build(network, batch=batch), work, "dense"), _ORT),
        )
        for engine, kind, file, script in runs:
            say(f"run {engine}")
            status, figures = _child(script, file, work / "feeds.npz", threads)
            peak, imported, version = figures or (None, None, "")
            rows.append(
                MemoryRow(
                    terms=terms,
                    network=network,
                    sparsity=str(kind),
                    source=kind.source,
                    batch=batch,
                    threads=threads,
                    engine=engine,
                    version=str(version),
                    status=status,
                    peak_mib=None if peak is None else int(peak) / 1024,
                    imported_mib=None if imported is None else int(imported) / 1024,
                    file_bytes=file.stat().st_size,
                )
            )
    return rows


def _child(script: str, file: Path, feeds: Path, threads: int) -> tuple[str, tuple[int, int, str] | None]:
    """Status, and (peak KiB, KiB after import, version) if it is "ok"."""
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + script, str(file), str(feeds), str(threads)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        reason = "not installed" if "ModuleNotFoundError" in lines[-1] else f"failed: {lines[-1][:160]}"
        return reason, None
    peak, imported, version = json.loads(done.stdout.strip().splitlines()[-1])
    return OK, (peak, imported, version)
