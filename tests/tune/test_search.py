"""Search and session on made-up times: no clock, so that every run gives the same result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from skimtvm.errors import InvalidOption
from skimtvm.schedules.gather_gemm import Knobs
from skimtvm.schedules.sites import AnyKnobs
from skimtvm.tune import session as session_module
from skimtvm.tune.features import NAMES, features
from skimtvm.tune.log import Log
from skimtvm.tune.measure import Outcome, Protocol
from skimtvm.tune.report import geometric_mean, rows, spearman, to_json
from skimtvm.tune.search import Search
from skimtvm.tune.session import Session
from skimtvm.tune.tasks import Task, merge

from .samples import conv_site, fc_site, model, task

COMPARE = Path(__file__).parents[2] / "examples" / "compare_search.py"

WIDE = conv_site(c=64, size=20, k=32, density=0.1)


def made_up(knobs: AnyKnobs) -> float:
    """Gain over the default: a smooth hill, its top at lanes 8, 12 vectors, blocks of 16 channels, no fetching, copies."""
    if not isinstance(knobs, Knobs):
        return 1.0 + 0.0001 * knobs.window - 1e-3 * knobs.ahead
    distance = abs(math.log2(knobs.vectors / 12)) + 0.5 * abs(math.log2(knobs.channel_block / 16))
    return 1.4 - 0.15 * distance - 0.1 * (knobs.lanes == 16) - 0.02 * (knobs.ahead > 0) + 0.1 * knobs.aligned


class Fake:
    """A measurer with made-up times; ``fail``: knobs that crash."""

    def __init__(self, gain: Any = made_up, fail: Any = lambda knobs: False) -> None:
        self.gain, self.fail, self.calls = gain, fail, 0
        self.protocols: list[Protocol | None] = []

    def measure(self, task: Task, candidates: Sequence[AnyKnobs], protocol: Protocol | None = None) -> list[Outcome]:
        self.calls += len(candidates)
        self.protocols.append(protocol)
        default = task.site.default(task.target)
        reference = 1e-3
        out = []
        for k in candidates:
            if self.fail(k):
                out.append(Outcome(k, error="signal 11"))
                continue
            median = reference if k == default else reference * self.gain(default) / self.gain(k)
            out.append(Outcome(k, median, median, median, 5, reference, float(median < reference)))
        return out


def run(method: str, trials: int, seed: int = 0) -> float:
    """Best gain that a search finds on the hill."""
    search = Search(task(WIDE), method, seed=seed)
    base, best, count = made_up(search.default), 0.0, 0
    while count < trials:
        for k in search.ask(min(8, trials - count)):
            count += 1
            search.tell(k, math.log2(made_up(k) / base))
            best = max(best, made_up(k) / base)
    return best


def test_features_have_their_names() -> None:
    for site in (WIDE, fc_site(), conv_site(kernel="dense", density=1.0)):
        t = task(site)
        x = features(t, list(site.space(t.target)))
        assert x.shape[1] == len(NAMES) and np.isfinite(x).all()


@pytest.mark.parametrize("method", ["random", "xgboost"])
def test_a_search_covers_the_space_once(method: str) -> None:
    pytest.importorskip("xgboost")
    t = task(conv_site(c=2, size=5, k=4))
    search = Search(t, method)
    space = {k for k in t.site.space(t.target) if k != search.default}
    asked: list[AnyKnobs] = []
    while batch := search.ask():
        asked += batch
        for k in batch:
            search.tell(k, 0.0)
    assert len(asked) == len(set(asked)) and set(asked) == space


def test_the_model_finds_more_than_luck() -> None:
    pytest.importorskip("xgboost")
    guided = [run("xgboost", 24, seed) for seed in range(3)]
    assert sum(guided) > sum(run("random", 24, seed) for seed in range(3))
    assert min(guided) >= 0.95 * run("random", 96)
    assert run("random", 16) == run("random", 16)


@pytest.mark.slow
@pytest.mark.skipif(not COMPARE.is_file(), reason="installed without the examples")
def test_the_comparison_of_searches_runs(tmp_path: Path) -> None:
    """What it measures depends on the machine; that it measures both searches does not."""
    pytest.importorskip("xgboost")
    onnx.save(model(), str(tmp_path / "net.onnx"))
    command = [sys.executable, str(COMPARE), "net.onnx", "--workloads", "1", "--trials", "4", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--output", "out.json"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(COMPARE.parents[1])},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(f["seed"], f["guided_trials"], f["random_trials"]) for f in found] == [(0, 4, 16), (1, 4, 16)]
    assert all(f["guided_gain"] >= 1 and f["random_gain"] >= 1 for f in found) and "of 2 reach 95%" in done.stdout


def test_before_there_are_trials_the_cheapest_by_the_model_come_first() -> None:
    t = task(WIDE)
    space = [k for k in WIDE.space(t.target) if k != WIDE.default(t.target)]
    cheapest = sorted(WIDE.cycles(k, t.target) for k in space)
    asked = Search(t, "xgboost").ask(8)[:4]
    assert [WIDE.cycles(k, t.target) for k in asked] == pytest.approx(cheapest[:4], rel=0.05)


def test_winners_of_other_layers_come_first() -> None:
    pytest.importorskip("xgboost")
    t = task(WIDE)
    known = list(t.site.space(t.target))[7]
    assert Search(t, "xgboost", first=[known]).ask()[0] == known
    assert isinstance(known, Knobs)
    # Blocks of 17 and 15 of 64 channels are none of the candidates; 16 is.
    for block in (17, 15):
        found = Search(t, "xgboost", first=[dataclasses.replace(known, channel_block=block)]).ask()[0]
        assert found == dataclasses.replace(known, channel_block=16)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidOption, match="random"):
        Search(task(), "luck")


def session(folder: Path, fake: Fake, trials: int = 16, **more: Any) -> Session:
    return Session(folder, fake, "random", trials, **more)  # type: ignore[arg-type]


def test_a_session_writes_every_trial_and_one_best(tmp_path: Path) -> None:
    fake = Fake(fail=lambda k: k.channel_block == 3)
    t = task(conv_site(c=9, size=20))
    (result,) = session(tmp_path, fake).run([t])
    records = Log.read(tmp_path).records
    trials = [r for r in records if r.kind == "trial"]
    (best,) = [r for r in records if r.kind == "best"]
    assert len(trials) == result.trials == 16 and sum(bool(r.error) for r in trials) == result.failed > 0
    assert best.gain == pytest.approx(result.gain) and result.gain == pytest.approx(max(1.0, *(r.gain for r in trials)))
    assert result.curve == tuple(sorted(result.curve)) and len(result.curve) == 16
    assert best.key == t.key and best.version == t.version


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    t = task(WIDE)
    list(session(tmp_path, Fake(), 8).run([t]))
    first = [r.knobs for r in Log.read(tmp_path).records if r.kind == "trial"]
    (result,) = session(tmp_path, Fake(), 24).run([t])
    trials = [r.knobs for r in Log.read(tmp_path).records if r.kind == "trial"]
    assert (result.resumed, result.trials) == (8, 24)
    assert len(trials) == 24 and trials[:8] == first
    assert all(k not in first for k in trials[8:])
    again = Fake()
    (same,) = session(tmp_path, again, 24).run([t])
    assert again.calls == 0 and same.knobs == result.knobs and same.gain == pytest.approx(result.gain, rel=1e-4)


def test_knobs_that_lose_again_are_no_best(tmp_path: Path) -> None:
    class Lucky(Fake):
        """Every candidate seems faster until it is measured with care."""

        def measure(self, task: Task, candidates: Any, protocol: Protocol | None = None) -> list[Outcome]:
            self.gain = (lambda k: 1.0) if protocol else made_up
            return super().measure(task, candidates, protocol)

    t = task(WIDE)
    (result,) = session(tmp_path, Lucky()).run([t])
    (best,) = Log.read(tmp_path).best().values()
    assert result.gain == 1.0 and result.knobs == t.site.default(t.target) and best.is_default and best.gain == 1.0


def test_the_last_comparison_is_repeated(tmp_path: Path) -> None:
    fake = Fake()
    list(session(tmp_path, fake, 8).run([task(WIDE)]))
    assert [p is not None for p in fake.protocols] == [False, True, True]


def test_the_budget_ends_a_session(tmp_path: Path) -> None:
    fake = Fake()
    assert list(session(tmp_path, fake, deadline=-1.0).run([task(WIDE)])) == [] and fake.calls == 0


def test_a_task_without_time_for_a_trial_gets_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hide an older winner when logs are merged."""
    clock = itertools.chain([0.0] * 3, itertools.repeat(2.0))
    monkeypatch.setattr(session_module.time, "monotonic", lambda: next(clock))
    (result,) = session(tmp_path, Fake(), deadline=1.0).run([task(WIDE)])
    assert result.trials == 0 and result.gain == 1.0 and not list(tmp_path.rglob("*.jsonl"))


def test_alike_layers_share_a_task() -> None:
    layers = [task(conv_site(density=d, seed=i)) for i, d in enumerate((0.2, 0.21, 0.5))] + [task(fc_site())]
    assert sorted(len(t.layers) for t in merge(layers)) == [1, 1, 2]


def test_report(tmp_path: Path) -> None:
    results = list(session(tmp_path, Fake()).run([task(WIDE), task(fc_site(k=500, n=100))]))
    assert len(rows(results)) == 2 and '"spearman"' in to_json(results)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0) and geometric_mean([]) == 1.0


def test_spearman() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40).tolist(), rng.standard_normal(40).tolist()
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1, 2, 3], [1, 2, 3]) is None and spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None
