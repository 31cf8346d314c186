"""Workers: what a candidate does to its process costs that candidate alone."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from skimtvm.errors import EnvironmentProblem
from skimtvm.schedules.fc_knobs import FcKnobs
from skimtvm.schedules.sites import Built, ConvSite
from skimtvm.tune.measure import Measurer, Protocol, servers
from skimtvm.tune.tasks import Task
from skimtvm.tune.worker import Options

from .samples import conv_site, fc_site, task

FAST = Protocol(rounds=3, seconds=1e-4, timeout=60)


class Dies:
    """A candidate that ends the process which receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class Hangs:
    """A candidate that never comes back."""

    def __reduce__(self) -> Any:
        return time.sleep, (600,)


class Wrong(ConvSite):
    """A layer whose kernel is wrong for tiles of one vector."""

    def build(self, knobs: Any, target: Any) -> Built:
        built = super().build(knobs, target)
        return (
            built if knobs.vectors > 1 else dataclasses.replace(built, constants=tuple(map(_doubled, built.constants)))
        )


def _doubled(array: Any) -> Any:
    return array * 2 if array.dtype == np.float32 else array


@pytest.fixture(scope="module")
def measurer() -> Iterator[Measurer]:
    with Measurer(Options(), FAST) as m:
        yield m


def candidates(t: Task, count: int) -> list[Any]:
    return list(t.site.space(t.target))[1 : count + 1]


@pytest.mark.parametrize("site", [conv_site(), fc_site(), conv_site(kernel="bsr4", rows=4)], ids=["csr", "fc", "bsr4"])
def test_candidates_are_timed_against_the_default(measurer: Measurer, site: Any) -> None:
    t = task(site)
    outcomes = measurer.measure(t, candidates(t, 4))
    assert [o.error for o in outcomes] == [""] * 4
    assert len({o.reference for o in outcomes}) == 1, "one set of rounds"
    assert all(o.samples == 3 and o.median and o.reference and o.p10 <= o.median <= o.p90 for o in outcomes)


def test_a_crash_and_a_hang_cost_themselves_alone(measurer: Measurer) -> None:
    t = task(conv_site(seed=3))
    a, b, c = candidates(t, 3)
    quick = dataclasses.replace(FAST, timeout=20)
    died = measurer.measure(t, [a, Dies(), b], quick)
    hung = measurer.measure(t, [Hangs(), c], dataclasses.replace(FAST, timeout=8))
    assert [bool(o.median) for o in (*died, *hung)] == [True, False, True, False, True]
    assert "exit code 7" in died[1].error and "no answer within 8 s" in hung[0].error


def test_an_impossible_candidate_says_why(measurer: Measurer) -> None:
    t = task(conv_site(seed=4))
    (bad,) = measurer.measure(t, [FcKnobs()])
    assert bad.median is None and "AssertionError" in bad.error


def test_a_wrong_result_is_no_candidate(measurer: Measurer) -> None:
    plain = conv_site(seed=5)
    t = task(Wrong(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}))
    default: Any = t.site.default(t.target)
    assert default.vectors > 1
    bad, good = measurer.measure(t, [dataclasses.replace(default, vectors=v) for v in (1, 2)])
    assert "differs" in bad.error and not good.error


def test_the_lock_is_waited_for(tmp_path: Any) -> None:
    import fcntl

    lock = tmp_path / "lock"
    t = task()
    with Measurer(Options(lock=str(lock)), FAST) as m:
        m.measure(t, candidates(t, 1))
        with lock.open("a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            worker = m.workers[0]
            assert worker.connection is not None
            worker.connection.send(("time", [0], 1, 1e-5))
            assert not worker.connection.poll(0.5)
            fcntl.flock(f, fcntl.LOCK_UN)
            assert worker.connection.poll(30)


def test_no_tracker() -> None:
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        servers(("127.0.0.1", 9), "key")
