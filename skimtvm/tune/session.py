"""A tuning run: tasks in turn, trials until the budget ends, a last comparison against the default, records in the log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..bench.machine import cpu_model, versions
from ..schedules.sites import AnyKnobs
from . import log
from .log import Log, Record
from .lookup import knobs_from
from .measure import Measurer, Outcome, Protocol
from .search import BATCH, WORST, Samples, Search
from .tasks import Task

FINAL = Protocol(rounds=25, seconds=0.002)
FINALISTS = 4
MARGIN = 1.02  # a win below this is noise
TRANSFER = 4  # winners of other layers that are tried first


@dataclass(frozen=True)
class Result:
    """``gain``: of ``knobs`` over the default in the last comparison (1 where the default stays); ``curve``: best gain
    after each trial; ``predicted``/``measured``: log2 gains of the trials whose score the model guessed beforehand."""

    task: Task
    knobs: AnyKnobs
    gain: float
    median_s: float
    default_s: float
    trials: int
    failed: int
    curve: tuple[float, ...] = ()
    predicted: tuple[float, ...] = ()
    measured: tuple[float, ...] = ()
    resumed: int = 0


@dataclass
class Progress:
    """What a caller shows: ``done`` of ``total`` tasks, trials of the current one, best gain so far."""

    task: str = ""
    done: int = 0
    total: int = 0
    trials: int = 0
    wanted: int = 0
    best: float = 1.0


@dataclass
class Session:
    """``trials`` of each task, those of earlier runs included; ``deadline``: of ``time.monotonic``."""

    folder: Path
    measurer: Measurer
    method: str = "xgboost"
    trials: int = 64
    seed: int = 0
    deadline: float = math.inf
    report: Callable[[Progress], None] = lambda progress: None
    samples: Samples = field(default_factory=Samples)

    def run(self, tasks: Sequence[Task]) -> Iterable[Result]:
        """Results as they come. Every trial is in the log before the next begins."""
        state = Progress(total=len(tasks))
        self.earlier = Log.read(self.folder)
        self.seen: dict[log.Key, list[Record]] = {}
        for record in self.earlier.records:
            self.seen.setdefault(record.key, []).append(record)
        for i, task in enumerate(tasks):
            state.done, state.task, state.trials, state.wanted, state.best = i, str(task), 0, self.trials, 1.0
            self.report(state)
            # What is left of the time goes to the tasks that are left, in equal parts.
            share = self.deadline
            if share != math.inf:
                share = time.monotonic() + max(0.0, self.deadline - time.monotonic()) / (len(tasks) - i)
            if time.monotonic() >= self.deadline:
                return
            yield self._tune(task, state, share)
        state.done = len(tasks)
        self.report(state)

    def _known(self, task: Task) -> dict[AnyKnobs, float]:
        known: dict[AnyKnobs, float] = {}
        for r in self.seen.get(task.key, ()):
            knobs = knobs_from(task.site, r.knobs, task.target, task.threads)
            if r.kind == "trial" and r.version == task.version and knobs is not None:
                known[knobs] = math.log2(r.gain) if r.gain else WORST
        return known

    def _elsewhere(self, task: Task) -> list[AnyKnobs]:
        """Winners of the same kernel: the same workload at other sparsities first, then the nearest in density. Records of
        an older state of the kernel may still point to good knobs."""
        found: dict[AnyKnobs, float] = {}
        for record in Log(tuple(r for rs in self.seen.values() for r in rs)).best().values():
            if record.kernel != task.site.name or record.is_default or record.isa != task.target.isa:
                continue
            knobs = knobs_from(task.site, record.knobs, task.target, task.threads)
            if knobs is None:
                continue
            apart = abs(math.log(max(record.sparsity.stored, 1e-4) / max(task.sparsity.stored, 1e-4)))
            apart += 0.0 if record.workload == task.site.workload else 2.0
            found[knobs] = min(apart, found.get(knobs, math.inf))
        return sorted(found, key=lambda k: found[k])[:TRANSFER]

    def _tune(self, task: Task, state: Progress, deadline: float) -> Result:
        known = self._known(task)
        default = task.site.default(task.target)
        search = Search(
            task, self.method, seed=self.seed, first=self._elsewhere(task), known=known, samples=self.samples
        )
        scores: dict[AnyKnobs, float] = dict(known)
        curve: list[float] = []
        best = 1.0
        for score in known.values():
            best = max(best, 2**score)
            curve.append(best)
        failed, predicted, measured = 0, [], []
        state.trials, state.best = len(scores), best
        while len(scores) < self.trials and time.monotonic() < deadline:
            batch = search.ask(min(BATCH, self.trials - len(scores)))
            if not batch:
                break
            for outcome in self.measurer.measure(task, batch):
                guess = search.predicted.get(outcome.knobs)
                self._write("trial", task, outcome, guess)
                score = math.log2(outcome.gain) if outcome.gain else WORST
                failed += not outcome.gain
                scores[outcome.knobs] = score
                search.tell(outcome.knobs, score)
                if guess is not None and outcome.gain:
                    predicted.append(guess)
                    measured.append(score)
                best = max(best, outcome.gain)
                curve.append(best)
            state.trials, state.best = len(scores), best
            self.report(state)
        if not scores and time.monotonic() >= deadline:  # nothing was compared with the default: no verdict to log
            return Result(task, default, gain=1.0, median_s=0.0, default_s=0.0, trials=0, failed=0)
        final = self._decide(task, scores, default, new=len(scores) > len(known))
        return Result(
            task, final.knobs, final.gain if final.knobs != default else 1.0, final.median or 0.0,
            final.reference or 0.0, len(scores), failed, tuple(curve), tuple(predicted), tuple(measured), len(known),
        )  # fmt: skip

    def _decide(self, task: Task, scores: dict[AnyKnobs, float], default: AnyKnobs, new: bool) -> Outcome:
        """The last comparison. The best few run again, and the best of them once more, since the first of many
        measurements is partly luck; only a knob that wins both times replaces the default."""
        old = [r for r in self.seen.get(task.key, ()) if r.kind == "best" and r.version == task.version]
        if old and not new:
            knobs = knobs_from(task.site, old[-1].knobs, task.target, task.threads) or default
            return Outcome(knobs, old[-1].median_s, reference=old[-1].default_s)
        finalists = sorted(scores, key=lambda k: -scores[k])[:FINALISTS]
        outcomes = [o for o in self.measurer.measure(task, finalists, FINAL) if o.gain > MARGIN]
        if outcomes:
            champion = max(outcomes, key=lambda o: o.gain)
            again = self.measurer.measure(task, [champion.knobs], FINAL)[0]
            if again.gain > MARGIN and again.wins >= 0.75:
                self._write("best", task, again, None)
                return again
        same = self.measurer.measure(task, [default], FINAL)[0]
        same = dataclasses.replace(same, reference=same.median)
        if same.median:
            self._write("best", task, same, None)
        return same

    def _write(self, kind: str, task: Task, o: Outcome, guess: float | None) -> None:
        key, default = task.key, task.site.default(task.target)
        record = Record(
            kind=kind,
            cpu=key.cpu,
            isa=key.isa,
            kernel=key.kernel,
            version=task.version,
            workload=key.workload,
            layout=key.layout,
            sparsity=task.sparsity,
            knobs=dataclasses.asdict(o.knobs),
            default_knobs=dataclasses.asdict(default),
            threads=task.threads,
            median_s=o.median,
            spread=(o.p10, o.p90) if o.median else None,
            samples=o.samples,
            default_s=o.reference,
            cpu_model=cpu_model(),
            error=o.error,
            predicted=2**guess if guess is not None else None,
            versions=_versions(),
            time=log.now(),
        )
        log.append(self.folder, record)
        if kind == "best":  # the tasks that follow start from it
            self.seen.setdefault(key, []).append(record)


def _versions() -> dict[str, str]:
    return {k: v for k, v in versions().items() if k in ("skimtvm", "apache-tvm")}
