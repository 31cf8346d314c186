"""Whole networks: SkimTVM's module against every peer, in one process and in turns."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact
from ..compiler import CompileOptions, compile_model
from ..profiler import Timing
from ..report import LayerRecord
from ..runtime import Module, load
from .engines import (
    Case,
    Engine,
    Peers,
    SkimTVM,
    Unavailable,
    difference,
    feeds_for,
    first_line,
    save_model,
    unavailable,
)
from .records import OURS, EngineTime, NetworkRow, Spread, Terms
from .sparsity import Sparsity
from .timing import Rounds, interleave

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a run in layers with weights (not the products of attention): all, and with nonzero weights."""

    macs: int
    nnz_macs: int
    density: float

    @staticmethod
    def of(layers: tuple[LayerRecord, ...]) -> Work:
        weights = sum(layer.weights for layer in layers)
        nnz = sum(layer.nnz for layer in layers)
        return Work(
            sum(layer.macs for layer in layers),
            round(sum(layer.macs * layer.density for layer in layers)),
            nnz / weights if weights else 1.0,
        )

    def time(
        self,
        engine: str,
        version: str,
        t: Timing,
        *,
        model: str = "",
        error: float | None = None,
        kernel: Timing | None = None,
    ) -> EngineTime:
        """The entry of an engine that took ``t``."""
        return EngineTime(
            engine,
            version,
            model=model,
            time=Spread.of(t),
            kernel=Spread.of(kernel) if kernel else None,
            gflops=2e-9 * self.nnz_macs / t.median,
            dense_gflops=2e-9 * self.macs / t.median,
            difference=error,
        )


def compile_to(path: Path, model: Any, options: CompileOptions | None = None) -> Module:
    """``model`` compiled to ``path`` and loaded."""
    return load(artifact.write(compile_model(model, options), path))


def measure_network(
    network: str,
    sparsity: Sparsity,
    batch: int,
    threads: int,
    *,
    peers: Peers,
    rounds: Rounds,
    terms: Terms,
    say: Say = lambda text: None,
) -> NetworkRow:
    """One row. Peers that cannot take part are in it with the reason."""
    with tempfile.TemporaryDirectory(prefix="skimtvm-bench-") as folder:
        work = Path(folder)
        say("build and compile")
        model = sparsity.build(network, batch=batch)
        begin = time.perf_counter()
        module = compile_to(work / "module.so", model)
        compile_s = time.perf_counter() - begin
        feeds = feeds_for(module)
        module_bytes = module.path.stat().st_size
        same = Case(save_model(model, work, "model"), feeds, batch, threads)
        cases = [(name, "", same) for name in peers.names]
        if sparsity.kind == "winograd":  # peers run the dense network that such a one is trained from
            dense = save_model(Sparsity("none").build(network, batch=batch), work, "dense")
            cases = [(name, "dense", Case(dense, feeds, batch, threads)) for name in peers.names]
        del model
        if sparsity.kind == "block" and "deepsparse" in peers.names:
            other = save_model(sparsity.unstructured.build(network, batch=batch), work, "unstructured")
            cases.append(("deepsparse", f"unstructured {sparsity.share:g}", Case(other, feeds, batch, threads)))
        engines = _race(module, cases, peers, rounds, threads, say)
    total = Work.of(module.manifest.layers)
    others = {e.engine: e.version for e in engines if e.version}  # DeepSparse lives in another environment
    return NetworkRow(
        terms=dataclasses.replace(terms, versions={**others, **terms.versions}),
        network=network,
        sparsity=str(sparsity),
        source=sparsity.source,
        batch=batch,
        threads=threads,
        density=total.density,
        macs=total.macs,
        nnz_macs=total.nnz_macs,
        module_bytes=module_bytes,
        compile_s=compile_s,
        engines=engines,
    )


def _race(
    module: Module, cases: list[tuple[str, str, Case]], peers: Peers, rounds: Rounds, threads: int, say: Say
) -> tuple[EngineTime, ...]:
    """Times of our module and of the peers, in the order of ``cases``."""
    work = Work.of(module.manifest.layers)
    runners: dict[str, Engine] = {OURS: SkimTVM(module, cases[0][2].feeds if cases else feeds_for(module), threads)}
    absent: dict[str, EngineTime] = {}
    errors: dict[str, float | None] = {}
    labels = {f"{name} ({model})" if model else name: (name, model) for name, model, _ in cases}
    try:
        mine = runners[OURS].outputs()
        for label, (name, model, case) in zip(labels, cases, strict=True):
            say(f"load {label}")
            opened = open_checked(name, model, case, peers, mine)
            if isinstance(opened, EngineTime):
                absent[label] = opened
            else:
                runners[label], errors[label] = opened
        say(f"measure {', '.join(runners)}")
        versions = {label: runner.version for label, runner in runners.items()}
        times = interleave(runners, rounds, threads=threads)
    finally:
        for runner in runners.values():
            runner.close()
    rows = [work.time(OURS, versions[OURS], times[OURS])]
    for label, (name, model) in labels.items():
        if label in absent:
            rows.append(absent[label])
        else:
            rows.append(work.time(name, versions[label], times[label], model=model, error=errors[label]))
    return tuple(rows)


def open_checked(
    name: str, model: str, case: Case, peers: Peers, mine: list[np.ndarray]
) -> EngineTime | tuple[Engine, float | None]:
    """The peer and how far its outputs are from ``mine`` (None where it runs other weights), or why it is absent."""
    engine: Engine | None = None
    try:
        engine = peers.open(name, case)
        theirs = engine.outputs()
        return engine, None if model else difference(mine, theirs)
    except Unavailable as e:
        reason = str(e)
    except Exception as e:  # each engine has its own exceptions
        reason = f"failed: {first_line(e)}"
    if engine is not None:
        engine.close()
    return unavailable(name, reason, model)
