"""Huge pages for what a block maps and fills, and for nothing else."""

import mmap

import numpy as np
import onnx
import pytest
from onnx import helper

import skimtvm
from skimtvm import huge_pages
from skimtvm.huge_pages import HUGE, anonymous, in_use, without

MB = 1 << 20


@pytest.fixture
def advised(monkeypatch):
    """Spans that would get huge pages, on any system."""
    spans = []
    monkeypatch.setattr(huge_pages, "wanted", lambda: True)
    monkeypatch.setattr(huge_pages, "_advise", lambda start, size: spans.append((start, start + size)))
    return spans


def mapped(size):
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, np.frombuffer(memory, np.uint8)


def inside(spans, array):
    start = array.__array_interface__["data"][0]
    return sum(max(0, min(high, start + array.nbytes) - max(low, start)) for low, high in spans)


@pytest.mark.parametrize(
    ("spans", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 7)], [(0, 2), (4, 6), (7, 10)]),
        ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]),
        ([(5, 8)], [(0, 2), (3, 6), (7, 9)], [(6, 7)]),
        ([], [(0, 1)], []),
    ],
)
def test_difference_of_spans(spans, others, left):
    assert without(spans, others) == left


def test_only_what_is_new_and_in_use(advised):
    old = mapped(8 * MB)
    old[1][:] = 1
    with huge_pages.huge_pages():
        new, idle = mapped(16 * MB), mapped(16 * MB)
        new[1][:] = 1
        idle[1][: MB // 2] = 1
    assert not inside(advised, old[1]) and not inside(advised, idle[1])
    assert inside(advised, new[1]) >= 16 * MB - 2 * HUGE
    assert all(low % HUGE == high % HUGE == 0 for low, high in advised)


def test_part_of_a_span_is_in_use():
    _, array = mapped(16 * MB)
    start = array.__array_interface__["data"][0]
    first = -(-start // HUGE) * HUGE - start
    array[first + HUGE : first + 3 * HUGE] = 1
    assert in_use((start, start + array.nbytes)) == [(start + first + HUGE, start + first + 3 * HUGE)]
    assert in_use((start + 1, start + HUGE)) == []


@pytest.mark.parametrize("why", ["user", "system", "no-file"])
def test_not_wanted(why, monkeypatch, tmp_path):
    monkeypatch.delenv("SKIMTVM_HUGE_PAGES", raising=False)
    switch = tmp_path / "enabled"
    switch.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SWITCH", switch)
    assert huge_pages.wanted()
    if why == "user":
        monkeypatch.setenv("SKIMTVM_HUGE_PAGES", "0")
    elif why == "system":
        switch.write_text("always madvise [never]\n")
    else:
        switch.unlink()
    monkeypatch.setattr(huge_pages, "_advise", lambda start, size: pytest.fail("advised"))
    with huge_pages.huge_pages():
        mapped(8 * MB)[1][:] = 1


def test_a_system_without_maps(monkeypatch, tmp_path, advised):
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "missing")
    assert anonymous() == []
    with huge_pages.huge_pages():
        mapped(8 * MB)[1][:] = 1
    assert not advised


@pytest.mark.skipif(not huge_pages.wanted(), reason="transparent huge pages are off")
def test_the_kernel_takes_the_advice(monkeypatch):
    monkeypatch.delenv("SKIMTVM_HUGE_PAGES", raising=False)
    with huge_pages.huge_pages():
        memory, array = mapped(16 * MB)
        array[:] = 1
    start = array.__array_interface__["data"][0]
    flags, here = "", False
    for line in open("/proc/self/smaps"):  # noqa: SIM115
        if "-" in line.split()[0]:
            low, high = (int(a, 16) for a in line.split()[0].split("-"))
            here = low <= start + 8 * MB < high
        elif here and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags
    assert (array == 1).all() and len(memory) == 16 * MB


def test_the_first_run_of_a_module_allocates_its_memory(tmp_path, advised):
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (1, 64, 192, 192)) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Exp", ["x"], ["t"]), helper.make_node("GlobalAveragePool", ["t"], ["m"]),
         helper.make_node("Sub", ["t", "m"], ["y"])],
        "g", info[:1], info[1:],
    )  # fmt: skip
    skimtvm.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.so")
    module = skimtvm.load(tmp_path / "m.so")
    x = np.zeros((1, 64, 192, 192), np.float32)
    advised.clear()
    module.run(x, threads=1)
    first = list(advised)
    module.run(x, threads=1)
    assert sum(high - low for low, high in first) >= x.nbytes - 2 * HUGE
    assert advised == first
