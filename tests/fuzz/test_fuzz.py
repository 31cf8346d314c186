"""Fuzzing, bounded: a few examples by default, and for SKIMTVM_FUZZ_SECONDS with ``pytest -m slow tests/fuzz``.

The default examples are the same in every run. A failure of the long run names its check and seed; once mended, it
becomes a test of the module that it was found in.
"""

from __future__ import annotations

import os
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
    """Every check with many seeds, from SKIMTVM_FUZZ_SEED on, each in a process of its own, for its part of the time."""
    budget = float(os.environ.get("SKIMTVM_FUZZ_SECONDS", "80")) / len(checks.CHECKS)
    seed = int(os.environ.get("SKIMTVM_FUZZ_SEED", "1000"))
    import skimtvm.compiler  # noqa: F401  once, not in every child

    failures, end, count = [], time.monotonic() + budget, 0
    while time.monotonic() < end and len(failures) < 5:
        if found := checks.survives(check, seed):
            failures.append(f"{check.__name__}(Random({seed})): {found}")
        seed, count = seed + 1, count + 1
    print(f"{check.__name__}: {count} seeds")
    assert count and not failures, "\n".join(failures)
