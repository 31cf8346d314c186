"""Single layers: the kernel's own time, its share of what the machine can do, and the dense layers of the peers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..compiler import CompileOptions
from ..profiler import Profile, Timing, profile
from ..report import LayerRecord
from ..runtime import Module
from ..workload import DenseWorkload
from .engines import Case, Engine, Peers, SkimTVM, feeds_for, save_model
from .layer_cases import LayerCase, build, skimcaffe_share
from .machine import Rates, read_gbs
from .networks import Say, Work, compile_to, open_checked
from .records import OURS, EngineTime, LayerRow, Spread, Terms
from .sparsity import Sparsity
from .timing import Rounds, interleave

TURNS = 4  # of the kernel timings: each engine's profiler times a block of runs in its turn
DENSE = CompileOptions(sparse_threshold=0.0)
SPARSE = CompileOptions(sparse_threshold=1.0)


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of each run: the calls of the layer itself, and those before it (None if there are none)."""

    record: LayerRecord
    kernel: Timing
    prepare: Timing | None

    @staticmethod
    def of(profiles: list[Profile]) -> KernelTimes:
        """``profiles`` of one module with one layer that has weights."""
        kernel: list[float] = []
        prepare: list[float] = []
        for p in profiles:
            at = next(i for i, t in enumerate(p.layers) if t.layer.macs)
            before = [t.time.samples for t in p.layers[:at]]
            kernel += p.layers[at].time.samples
            prepare += [sum(run) for run in zip(*before, strict=True)]
        record = next(t.layer for t in profiles[0].layers if t.layer.macs)
        return KernelTimes(record, Timing.of(kernel), Timing.of(prepare) if prepare else None)

    @property
    def seconds(self) -> float:
        """Median of kernel and preparation together."""
        return self.kernel.median + (self.prepare.median if self.prepare else 0.0)


def measure_layer(
    case: LayerCase,
    asked: Sparsity,
    threads: int,
    *,
    peers: Peers,
    rounds: Rounds,
    rates: Rates,
    terms: Terms,
    say: Say = lambda text: None,
) -> LayerRow:
    """One row: the automatic choice, the same layer dense (and sparse, if the choice is dense), and the peers."""
    sparsity = case.pruned(asked)
    with tempfile.TemporaryDirectory(prefix="skimtvm-bench-") as folder:
        work = Path(folder)
        say("compile")
        model = build(case, sparsity)
        module = compile_to(work / "auto.so", model)
        modules = {"auto": module, "dense": compile_to(work / "dense.so", model, DENSE)}
        record = next(layer for layer in module.manifest.layers if layer.macs)
        if not record.sparse and sparsity.kind != "none":
            modules["sparse"] = compile_to(work / "sparse.so", model, SPARSE)
        feeds = feeds_for(module)
        batch = case.workload.m if isinstance(case.workload, DenseWorkload) else case.workload.n
        other = "" if case.direct is case else "dense"  # weights of the peers, if not ours
        theirs = build(case.direct, Sparsity.parse("none")) if other else model
        info = Case(save_model(theirs, work, "layer"), feeds, batch, threads)
        runners: dict[str, Engine] = {OURS: SkimTVM(module, feeds, threads)}
        absent: dict[str, EngineTime] = {}
        errors: dict[str, float | None] = {}
        try:
            mine = runners[OURS].outputs()
            for name in peers.names:
                opened = open_checked(name, other, info, peers, mine)
                if isinstance(opened, EngineTime):
                    absent[name] = opened
                else:
                    runners[name], errors[name] = opened
            say("measure")
            whole = interleave(runners, rounds, threads=threads)
            kernels, alone = _kernels(modules, feeds, runners, rounds, threads)
            versions = {name: runner.version for name, runner in runners.items()}
        finally:
            for runner in runners.values():
                runner.close()
    total = Work.of(module.manifest.layers)
    engines = []
    for name in (OURS, *peers.names):
        if name in absent:
            engines.append(absent[name])
            continue
        kernel, weights = (kernels["auto"].kernel, "") if name == OURS else (alone.get(name), other)
        error = errors.get(name)
        engines.append(total.time(name, versions[name], whole[name], model=weights, error=error, kernel=kernel))
    return _row(case, sparsity, batch, threads, rates, terms, kernels, tuple(engines))


def _kernels(
    modules: dict[str, Module], feeds: object, runners: dict[str, Engine], rounds: Rounds, threads: int
) -> tuple[dict[str, KernelTimes], dict[str, Timing]]:
    """Times of the layer alone: of our ``modules``, and of the peers that can tell. In turns, a block of runs each."""
    runs = max(1, -(-rounds.repeat // TURNS))
    profiles: dict[str, list[Profile]] = {name: [] for name in modules}
    samples: dict[str, list[float]] = {name: [] for name in runners if name != OURS}
    for _ in range(min(TURNS, rounds.repeat)):
        for name, module in modules.items():
            profiles[name].append(profile(module, feeds, repeat=runs, warmup=rounds.warmup, threads=threads))
        for name in samples:
            samples[name] += runners[name].kernel_seconds(runs)
    ours = {name: KernelTimes.of(p) for name, p in profiles.items()}
    return ours, {name: Timing.of(s) for name, s in samples.items() if s}


def _row(
    case: LayerCase,
    sparsity: Sparsity,
    batch: int,
    threads: int,
    rates: Rates,
    terms: Terms,
    kernels: dict[str, KernelTimes],
    engines: tuple[EngineTime, ...],
) -> LayerRow:
    auto, dense = kernels["auto"], kernels["dense"]
    record = auto.record
    flops = 2e-9 * record.macs
    sparse = kernels.get("sparse", auto)
    alpha = None
    if sparse.record.sparse:
        # Efficiencies of multiply-adds that are done; the peak cancels.
        alpha = (flops / dense.kernel.median) / (flops * record.density / sparse.kernel.median)
    done = record.density if record.sparse else 1.0
    reference = skimcaffe_share(case, sparsity)
    streams = isinstance(case.workload, DenseWorkload) and batch == 1
    return LayerRow(
        terms=terms,
        layer=case.name,
        workload=str(case.workload),
        sparsity=str(sparsity),
        source="random normal weights, pruned by magnitude" if sparsity.kind != "none" else "random normal weights",
        batch=batch,
        threads=threads,
        density=record.density,
        kernel_name=record.kernel,
        reason=record.reason,
        macs=record.macs,
        stored_bytes=record.stored_bytes,
        kernel=Spread.of(auto.kernel),
        prepare=Spread.of(auto.prepare) if auto.prepare else None,
        dense=Spread.of(dense.kernel),
        peak_gflops=rates.peak_gflops,
        gflops=flops * record.density / auto.kernel.median,
        dense_gflops=flops / auto.kernel.median,
        share_of_peak=flops * done / auto.kernel.median / rates.peak_gflops,
        alpha=alpha,
        bandwidth_gbs=rates.bandwidth_gbs,
        bandwidth_same_gbs=read_gbs(threads, record.stored_bytes) if streams else None,
        weights_gbs=record.stored_bytes / auto.kernel.median * 1e-9,
        base=case.base,
        skimcaffe_share=reference,
        skimcaffe_speedup=flops * record.density / auto.seconds / rates.peak_gflops / reference if reference else None,
        engines=engines,
    )
