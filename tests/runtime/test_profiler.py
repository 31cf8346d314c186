"""The timing protocol and the per-layer profile. No test depends on how fast the machine is."""

import dataclasses
import json

import numpy as np
import pytest

import skimtvm
from skimtvm import artifact
from skimtvm.errors import InternalError, InvalidOption
from skimtvm.profiler import Timing, measure, random_feeds
from skimtvm.report import TensorSpec


def test_measure_interleaves():
    order = []
    times = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeat=3, warmup=2)
    assert "".join(order) == "aabb" + "ab" * 3
    assert [len(t.samples) for t in times.values()] == [3, 3]


def test_measure_settles_with_a_call_that_does_not_count():
    calls = []
    times = measure({"a": lambda: calls.append(0)}, repeat=3, warmup=0, settle=0.001)
    assert len(calls) == 6 and len(times["a"].samples) == 3


def test_measure_fills_min_time():
    calls = []
    times = measure({"a": lambda: calls.append(0)}, repeat=2, warmup=0, min_time=0.002)
    assert times["a"].calls > 10 and len(calls) == 1 + 2 * times["a"].calls


def test_measure_rejects_nonsense():
    with pytest.raises(InvalidOption):
        measure({}, repeat=0)


def test_timing():
    t = Timing.of([3.0, 1.0, 2.0])
    assert (t.median, t.p10, t.p90) == (2.0, pytest.approx(1.2), pytest.approx(2.8))


def test_random_feeds():
    specs = (TensorSpec("x", (2, 3), "float32"), TensorSpec("i", (4,), "int64"), TensorSpec("b", (), "bool"))
    feeds = random_feeds(specs)
    assert {n: (a.shape, a.dtype.name) for n, a in feeds.items()} == {s.name: (s.shape, s.dtype) for s in specs}
    np.testing.assert_array_equal(feeds["x"], random_feeds(specs)["x"])


def test_profile(module, sample):
    p = skimtvm.profile(module, repeat=7, warmup=1, threads=1)
    assert [(t.layer.name, t.calls) for t in p.layers] == [("fc", 2), ("who", 1)]
    assert len(p.total.samples) == len(p.layers[0].time.samples) == 7
    assert 0 < p.callback_overhead < 1e-4
    fc = p.layers[0]
    assert fc.dense_gflops * fc.time.median == pytest.approx(2e-9 * sample.ROWS * sample.COLUMNS)
    assert fc.gflops == pytest.approx(fc.dense_gflops / 2)
    assert p.layers_total < 10 * p.total.median
    document = json.loads(p.to_json())
    assert document["layers"][0]["name"] == "fc" and document["threads"] == 1
    assert module.run(random_feeds(module.inputs))  # the instrument stays with the profiler's own VM


def test_profile_takes_a_path_and_feeds(file, data):
    assert skimtvm.profile(file, {"data": data}, repeat=1, warmup=0, threads=2).threads == 2


def test_profile_notices_a_manifest_that_does_not_fit(sample, tmp_path):
    manifest = dataclasses.replace(sample.MANIFEST, calls=(0, 1))
    path = artifact.write(sample.build(manifest), tmp_path / "m.so")
    with pytest.raises(InternalError, match=r"made 3 kernel calls .*its manifest lists 2"):
        skimtvm.profile(path, repeat=1)
