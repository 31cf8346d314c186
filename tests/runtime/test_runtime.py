"""Loading and running: compatibility, inputs, threads, isolation."""

import ctypes
import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import skimtvm
from skimtvm import artifact, runtime
from skimtvm.errors import IncompatibleTarget, InputMismatch, InvalidArtifact, InvalidOption

IDS = "who/ids:0"


def _aligned(shape, offset=0):
    count = int(np.prod(shape)) * 4
    raw = np.zeros(count + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + count].view("float32").reshape(shape)


def _close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- loading -----------------------------------------------------------------------------------------------------


def test_runs(module, sample, data):
    out = module.run({"data": data})
    assert list(out) == ["y", "same", IDS]
    _close(out["y"], sample.expected(data))
    assert module.inputs == sample.MANIFEST.inputs and module.outputs == sample.MANIFEST.outputs


def test_loading_uses_the_runtime_library_only(file, in_process):
    text = (
        "import os, sys, skimtvm; skimtvm.load(sys.argv[1]); import tvm; "
        "maps = open('/proc/self/maps').read(); "
        "print(tvm._RUNTIME_ONLY, 'libtvm_compiler' in maps, 'TVM_USE_RUNTIME_LIB' in os.environ)"
    )
    assert in_process(text, file) == "True False False"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"features": ("avx2", "avx9000", "amx_tile2")},
            IncompatibleTarget,
            "this CPU lacks avx9000, amx_tile2; recomp",
        ),
        ({"tvm_version": "0.28.1"}, InvalidArtifact, r"was made with TVM 0\.28\.1, this is TVM 0\.27"),
        ({"skimtvm_version": "7.1.0"}, InvalidArtifact, r"was made with skimtvm 7\.1\.0, this is skimtvm"),
    ],
    ids=["isa", "tvm", "skimtvm"],
)
def test_incompatible(sample, tmp_path, monkeypatch, *, change, error, text):
    path = artifact.write(sample.build(dataclasses.replace(sample.MANIFEST, **change)), tmp_path / "m.so")
    monkeypatch.setattr(runtime, "_open", lambda *_: pytest.fail("mapped before it was checked"))
    with pytest.raises(error, match=text):
        skimtvm.load(path)


def test_same_tvm_minor_version_is_fine(sample, tmp_path):
    manifest = dataclasses.replace(sample.MANIFEST, tvm_version="0.27.9")
    assert skimtvm.load(artifact.write(sample.build(manifest), tmp_path / "m.so"))


def test_damaged_file_is_not_mapped(file, tmp_path, monkeypatch):
    whole = bytearray(file.read_bytes())
    whole[5000] ^= 4
    (tmp_path / "m.so").write_bytes(whole)
    monkeypatch.setattr(runtime, "_open", lambda *_: pytest.fail("mapped before it was checked"))
    with pytest.raises(InvalidArtifact, match="damaged"):
        skimtvm.load(tmp_path / "m.so")


def test_two_loads_share_the_library_but_no_vm(file, tmp_path):
    (tmp_path / "link.so").symlink_to(file)
    one, two = skimtvm.load(file), skimtvm.load(tmp_path / "link.so")
    assert one._library is two._library
    assert one._idle[0].module is not two._idle[0].module
    assert not one._idle[0].module.same_as(two._idle[0].module)


def test_weights_are_in_memory_once(file, in_process):
    text = """
import os, sys, numpy, skimtvm
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
x = numpy.ones((1, 3, 8, 8), 'f4')
first = skimtvm.load(sys.argv[1]); first.run(x)
before = rss()
more = [skimtvm.load(sys.argv[1]) for _ in range(10)]
for m in more: m.run(x)
print((rss() - before) >> 20)
"""
    assert int(in_process(text, file)) < 10  # MB; the weights are 20


def test_replaced_file_is_loaded_anew(sample, file, data, tmp_path):
    path = tmp_path / "m.so"
    shutil.copy(file, path)
    old = skimtvm.load(path)
    manifest = dataclasses.replace(sample.MANIFEST, model_name="second")
    artifact.write(sample.build(manifest), path, overwrite=True)
    new = skimtvm.load(path)
    assert (old.manifest.model_name, new.manifest.model_name) == ("sample", "second")
    _close(old.run(data)["y"], new.run(data)["y"])


def test_file_may_disappear_after_loading(file, data, sample, tmp_path):
    path = tmp_path / "m.so"
    shutil.copy(file, path)
    module = skimtvm.load(path)
    path.unlink()
    _close(module.run(data)["y"], sample.expected(data))


def test_wrong_name(file, tmp_path):
    shutil.copy(file, tmp_path / "m.bin")
    with pytest.raises(InvalidArtifact, match=r"must end in \.so"):
        skimtvm.load(tmp_path / "m.bin")


# ---- inputs ------------------------------------------------------------------------------------------------------


class Foreign:
    """A tensor of another library: nothing but DLPack."""

    def __init__(self, array, device=1):
        self._array, self._device = array, device

    def __dlpack_device__(self):
        return (self._device, 0)

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


@pytest.mark.parametrize("offset", [0, 4, 16, 32, 60])
def test_any_alignment_gives_the_right_numbers(module, sample, data, offset):
    array = _aligned(data.shape, offset)
    array[:] = data
    _close(module.run(array)["y"], sample.expected(data))


def test_aligned_input_is_not_copied():
    array = _aligned((2, 1, 16))
    assert ctypes.addressof(ctypes.c_char.from_buffer(array)) == np.from_dlpack(runtime.as_tensor(array)).ctypes.data
    assert np.from_dlpack(runtime.as_tensor(_aligned((2, 16), 4))).ctypes.data % 64 == 0


def test_odd_strides_of_axes_of_length_one(module, sample):
    data = np.lib.stride_tricks.as_strided(_aligned((1, 3, 8, 8)), (1, 3, 8, 8), (4444, 256, 32, 4))
    data[...] = 1
    _close(module.run(data)["y"], sample.expected(np.ones((1, 3, 8, 8), "float32")))


def test_read_only_and_foreign_arrays(module, sample, data):
    want = sample.expected(data)
    data.flags.writeable = False
    _close(module.run({"data": data})["y"], want)
    _close(module.run({"data": Foreign(data.copy())})["y"], want)


Z = np.zeros
BAD = {
    "nhwc": (Z((1, 8, 8, 3), "f4"), "input 'data': got f32[1,8,8,3], module expects f32[1,3,8,8]; transpose to NCHW"),
    "no-batch": (Z((3, 8, 8), "f4"), "got f32[3,8,8], module expects f32[1,3,8,8]; add the batch axis with x[None]"),
    "batch": (Z((4, 3, 8, 8), "f4"), "feed batches of 1 or recompile with --batch 4"),
    "size": (Z((1, 3, 9, 9), "f4"), "recompile with --input-shape data=1,3,9,9"),
    "rank": (Z((1, 192), "f4"), "give it 4 axes"),
    "f64": (Z((1, 3, 8, 8)), "got f64[1,3,8,8], module expects f32[1,3,8,8]; convert with .astype(numpy.float32)"),
    "u8-and-shape": (Z((1, 8, 8, 3), "u1"), "transpose to NCHW and convert with .astype(numpy.float32)"),
    "big-endian": (Z((1, 3, 8, 8), ">f4"), "got byte-swapped f32[1,3,8,8]"),
    "object": (Z((1, 3, 8, 8), object), "got object[1,3,8,8]"),
    "strided": (Z((1, 3, 8, 16), "f4")[..., ::2], "not C-contiguous; pass numpy.ascontiguousarray"),
    "fortran": (np.asfortranarray(Z((1, 3, 8, 8), "f4")), "not C-contiguous"),
    "list": ([1.0], "got a list; pass a NumPy array or a DLPack tensor"),
    "none": (None, "got a NoneType; pass"),
    "gpu": (Foreign(Z((1, 3, 8, 8), "f4"), device=2), "not in CPU memory; move it to the CPU"),
    "empty": (Z((1, 3, 0, 8), "f4"), "got f32[1,3,0,8]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(module, case):
    value, text = BAD[case]
    with pytest.raises(InputMismatch) as e:
        module.run({"data": value})
    assert text in str(e.value) and "\n" not in str(e.value)


def test_names(module, data):
    with pytest.raises(InputMismatch, match=r"input 'dta' is unknown to this module; did you mean 'data'\?"):
        module.run({"dta": data})
    with pytest.raises(InputMismatch, match=r"input 'zz' is unknown to this module; feed data: f32\[1,3,8,8\]"):
        module.run({"data": data, "zz": data})
    with pytest.raises(InputMismatch, match=r"input 'data' is missing; feed data: f32\[1,3,8,8\]"):
        module.run({})


# ---- outputs -----------------------------------------------------------------------------------------------------


def test_outputs_stay_valid(module, sample, data):
    first = module.run(data)["y"]
    kept = first.copy()
    for k in range(5):
        module.run(data * k)
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # the caller's own
    _close(module.run(data)["y"], sample.expected(data))


def test_outputs_survive_their_module(file, sample, data):
    module = skimtvm.load(file)
    out = module.run(data)["y"]
    del module
    _close(out, sample.expected(data))


def test_input_passed_through_is_a_copy(module):
    array = _aligned((1, 3, 8, 8))
    same = module.run(array)["same"]
    array += 1
    assert not same.any()


# ---- threads -----------------------------------------------------------------------------------------------------


def _threads_used(module, data, threads):
    return len(set(module.run(data, threads=threads)[IDS].tolist()))


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (3, 1, 2, 4, 4, 1)], ids=str)
def test_threads_are_what_was_asked_for(file, in_process, order):
    text = """
import sys, numpy, skimtvm
m = skimtvm.load(sys.argv[1]); x = numpy.ones((1, 3, 8, 8), 'f4')
print([len(set(m.run(x, threads=int(n))['who/ids:0'].tolist())) for n in sys.argv[2:]])
"""
    assert in_process(text, file, *order) == str(list(order))


def test_default_is_the_affinity_mask(file, in_process):
    text = """
import os, sys
cpus = sorted(os.sched_getaffinity(0)); os.sched_setaffinity(0, cpus[:int(sys.argv[2])])
import numpy, skimtvm
m = skimtvm.load(sys.argv[1]); x = numpy.ones((1, 3, 8, 8), 'f4')
print(len(set(m.run(x)['who/ids:0'].tolist())), len(os.sched_getaffinity(0)))
"""
    for n in {1, len(os.sched_getaffinity(0))}:
        assert in_process(text, file, n) == f"{n} {n}"  # and the mask is as it was


def test_affinity_is_kept_even_with_bound_workers(file, in_process):
    text = """
import os, sys; os.environ["TVM_BIND_THREADS"] = "1"
import numpy, skimtvm
before = os.sched_getaffinity(0)
skimtvm.load(sys.argv[1], threads=2).run(numpy.ones((1, 3, 8, 8), 'f4'))
print(os.sched_getaffinity(0) == before)
"""
    assert in_process(text, file) == "True"


def test_module_default_and_run_override(file, data):
    module = skimtvm.load(file, threads=2)
    assert _threads_used(module, data, None) == 2
    assert _threads_used(module, data, 1) == 1


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 10**9])
def test_bad_thread_count(module, file, data, threads):
    with pytest.raises(InvalidOption, match="give a whole number from 1"):
        module.run(data, threads=threads)
    with pytest.raises(InvalidOption):
        skimtvm.load(file, threads=threads)


def test_many_python_threads_on_one_module(module, sample):
    inputs = [np.random.default_rng(k).standard_normal((1, 3, 8, 8)).astype("float32") for k in range(24)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: module.run(x, threads=1)["y"], inputs))
    for x, y in zip(inputs, results, strict=True):
        _close(y, sample.expected(x))
    assert len(module._idle) <= 4


def test_fork_after_a_run(file, in_process):
    text = """
import os, sys, numpy, skimtvm
m = skimtvm.load(sys.argv[1]); x = numpy.ones((1, 3, 8, 8), 'f4')
m.run(x, threads=2)
if (pid := os.fork()) == 0:
    os._exit(len(set(m.run(x, threads=2)['who/ids:0'].tolist())))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert in_process(text, file, timeout=60) == "2"
