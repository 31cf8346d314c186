"""Is the search that a model guides better than luck? Measures it: on a few workloads of a network, for several seeds, the
guided search gets N trials and a random one four times as many; then the best few of both run against each other, as the
tuner has its finalists run again.

    pip install 'skimtvm[tune]'
    python examples/compare_search.py model.onnx --workloads 5 --trials 24 --seeds 3 --output compare.json

Every trial is a real measurement on this machine (about half a second). Prints, for each workload and seed, the gain of
both winners over the default knobs, and the share of the random search's speed that the guided one reached.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from skimtvm.compiler import CompileOptions
from skimtvm.schedules.sites import AnyKnobs
from skimtvm.tune.measure import Measurer, Protocol
from skimtvm.tune.report import geometric_mean, short
from skimtvm.tune.search import WORST, Search
from skimtvm.tune.session import FINAL, FINALISTS
from skimtvm.tune.tasks import Task, extract, merge
from skimtvm.tune.worker import Options

LONGER = 4  # times as many trials for the random search
BATCH = 4


def best(task: Task, method: str, trials: int, seed: int, measurer: Measurer) -> list[AnyKnobs]:
    """The knobs with the largest measured gains. The search knows no other trials than its own."""
    search = Search(task, method, seed=seed)
    gains: dict[AnyKnobs, float] = {}
    while len(gains) < trials and (batch := search.ask(min(BATCH, trials - len(gains)))):
        for outcome in measurer.measure(task, batch):
            search.tell(outcome.knobs, math.log2(outcome.gain) if outcome.gain else WORST)
            gains[outcome.knobs] = outcome.gain
    return sorted(gains, key=lambda knobs: -gains[knobs])[:FINALISTS]


def compare(task: Task, trials: int, seed: int, measurer: Measurer) -> dict[str, Any]:
    guided = best(task, "xgboost", trials, seed, measurer)
    random = best(task, "random", LONGER * trials, seed, measurer)
    outcomes = measurer.measure(task, [*guided, *random], FINAL)
    # What loses against the default here would not be used.
    gains = [max(1.0, *(o.gain for o in outcomes[part])) for part in (slice(len(guided)), slice(len(guided), None))]
    return {
        "workload": f"{task.site.name} {task.site.workload} density {task.sparsity.density:.3f}",
        "seed": seed, "guided_trials": trials, "random_trials": LONGER * trials,
        "space": sum(1 for _ in task.site.space(task.target)) - 1,
        "guided_gain": gains[0], "random_gain": gains[1], "share": gains[0] / gains[1],
        "guided": [short(k) for k in guided], "random": [short(k) for k in random],
    }  # fmt: skip


def spaced(tasks: list[Task], count: int) -> list[Task]:
    """``count`` of ``tasks``, from the first to the last in equal steps."""
    if count >= len(tasks):
        return tasks
    return [tasks[round(i * (len(tasks) - 1) / max(1, count - 1))] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--workloads", type=int, default=5, help="how many, from the one with most work to the least")
    parser.add_argument("--trials", type=int, default=24, help="of the guided search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON, a list of comparisons")
    parser.add_argument("--cpu", type=int, action="append", default=[], help="where kernels run")
    parser.add_argument("--lock", default="", help="file to lock while a kernel is timed")
    parser.add_argument("--realtime", type=int, default=0, help="priority meanwhile (SCHED_FIFO)")
    args = parser.parse_args()
    tasks = merge(task for model in args.models for task in extract(model, CompileOptions(log="none")))
    tasks = spaced([t for t in tasks if t.site.name == "csr_conv2d"], args.workloads)
    found: list[dict[str, Any]] = []
    how = Options(lock=args.lock, realtime=args.realtime)
    with Measurer(how, Protocol(), cpus=args.cpu) as measurer:
        for task in tasks:
            for seed in range(args.seeds):
                one = compare(task, args.trials, seed, measurer)
                found.append(one)
                gains = f"guided {one['guided_gain']:.3f}x, random {one['random_gain']:.3f}x"
                print(f"{one['workload']}, seed {seed}: {gains}, {100 * one['share']:.1f}%", flush=True)
                if args.output:
                    args.output.write_text(json.dumps(found, indent=1) + "\n")
    shares = [one["share"] for one in found]
    print(
        f"{sum(s >= 0.95 for s in shares)} of {len(shares)} reach 95% of the best of {LONGER} times as many random trials; "
        f"mean {100 * geometric_mean(shares):.1f}%, least {100 * min(shares):.1f}%"
    )


if __name__ == "__main__":
    main()
