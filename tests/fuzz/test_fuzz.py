"""Fuzzing, bounded: a few examples by default, and for SKIMTVM_FUZZ_SECONDS with ``pytest -m slow tests/fuzz``.

The default examples are the same in every run. A failure of the long run names its check and seed; once mended, it
becomes a test of the module that it was found in.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import checks

SEEDS = st.integers(0, 2**32 - 1)


def bounded(examples: int):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@bounded(200)
@given(SEEDS)
def test_a_damaged_module_is_refused(seed):
    checks.damaged_bytes(Random(seed))


@bounded(200)
@given(SEEDS)
def test_a_manifest_that_no_compiler_wrote_is_refused_or_sound(seed):
    checks.damaged_manifest(Random(seed))


@bounded(200)
@given(SEEDS)
def test_a_damaged_line_of_a_tuning_log_costs_that_line(seed):
    checks.damaged_tuning_log(Random(seed))


@bounded(300)
@given(SEEDS)
def test_a_damaged_request_is_refused_or_fits_the_model(seed):
    checks.damaged_request(Random(seed))


def test_the_sealed_manifest_is_read():
    assert checks.read_artifact(checks.sealed(checks.MANIFEST.to_json().encode())) == checks.MANIFEST


def test_damaged_models_are_refused_or_imported():
    for seed in range(40):
        checks.import_damaged(Random(seed))
        checks.import_flipped(Random(seed))


def test_random_graphs_agree_with_onnx_runtime():
    pytest.importorskip("onnxruntime")
    for seed in range(12):
        checks.same_as_onnxruntime(Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
def test_survives(check):
    """Every check with many seeds, from SKIMTVM_FUZZ_SEED on, in other processes, for its part of the time."""
    budget = float(os.environ.get("SKIMTVM_FUZZ_SECONDS", "80")) / len(checks.CHECKS)
    first = seed = int(os.environ.get("SKIMTVM_FUZZ_SEED", "1000"))
    import skimtvm.compiler  # noqa: F401  once, not in every child

    failures, end = [], time.monotonic() + budget
    while time.monotonic() < end and len(failures) < 5:
        for found in checks.outcomes(check, seed, 10):
            if found:
                failures.append(f"{check.__name__}(Random({seed})): {found}")
            seed += 1
    print(f"{check.__name__}: {seed - first} seeds")
    assert seed > first and not failures, "\n".join(failures)


def test_a_crash_and_a_failure_are_outcomes_of_their_seed():
    fourth, sixth = Random(4).random(), Random(6).random()

    def check(rnd):
        value = rnd.random()
        if value == fourth:
            os.kill(os.getpid(), signal.SIGKILL)
        if value == sixth:
            raise ValueError("six")

    found = list(checks.outcomes(check, 3, 5))
    assert [bool(f) for f in found] == [False, True, False, True, False]
    assert "SIGKILL" in found[1] and "ValueError: six" in found[3]
