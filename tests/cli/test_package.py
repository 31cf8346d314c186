"""Bundles: what is in them, the C++ example with nothing else installed, and files that the C library must refuse."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
FOOTER = struct.Struct("<QQIIII8s")
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def compiled(skim, onnx_file, several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    skim("compile", onnx_file, "-o", folder / "one.so", "--batch", "2").succeeded()
    shutil.copy(several, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(skim, compiled):
    if GXX is None:
        pytest.skip("g++ is not installed")
    out = skim("package", compiled / "several.so", "-o", compiled / "bundle").succeeded()
    assert "TVM runtime" in out and "built with" in out
    return compiled / "bundle"


@pytest.fixture(scope="module")
def program(bundle):
    command = [
        GXX,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        EXAMPLE / "run_model.cc",
        "-o",
        bundle.parent / "run_model",
    ]
    command += [f"-I{bundle}/include", f"-L{bundle}/lib", "-lskimtvm_c", "-Wl,-rpath,$ORIGIN/bundle/lib"]
    subprocess.run([*command, f"-Wl,-rpath-link,{bundle}/lib"], check=True)
    return bundle.parent / "run_model"


def run(program, *arguments, cwd):
    """The program as on a host without Python: an empty folder is the whole PATH."""
    (Path(cwd) / "nothing").mkdir(exist_ok=True)
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": f"{cwd}/nothing"},
        cwd=cwd,
        check=False,
    )


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "images", "threads"), [("one", 0, 1), ("several", 1, 1), ("several", 7, 2)])
def test_cpp_gives_the_bits_of_python(skim, compiled, bundle, program, tmp_path, name, images, threads):
    x = np.random.default_rng(images).standard_normal((images or 2, 3, 16, 16)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    x.tofile(tmp_path / "x.bin")
    module = compiled / f"{name}.so"
    skim(
        "run", module, "--input", f"data={tmp_path / 'x.npy'}", "--output-dir", tmp_path, "--threads", threads
    ).succeeded()
    done = run(program, module, threads, images, 3, tmp_path / "out", "x.bin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "output logits: float32[" in done.stdout and done.stderr == ""
    assert (tmp_path / "out0.bin").read_bytes() == np.load(tmp_path / "logits.npy").tobytes()


def test_bundle_runs_where_it_is_moved(bundle, program, tmp_path):
    """Nothing in it names the folder that it was made in, nor the libraries of this Python."""
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copy(program, tmp_path / "run_model")
    np.zeros((1, 3, 16, 16), "f4").tofile(tmp_path / "x.bin")
    done = run(tmp_path / "run_model", tmp_path / "bundle" / "several.so", 1, 1, 1, "out", "x.bin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = subprocess.run(["ldd", tmp_path / "run_model"], capture_output=True, text=True, check=True).stdout
    ours = [line for line in loaded.splitlines() if "skimtvm" in line or "tvm_" in line]
    assert len(ours) == 3 and all(str(tmp_path) in line for line in ours)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@needs_gxx
def test_cmake_builds_the_library_from_source(skim, compiled, tmp_path):
    bundle = tmp_path / "bundle"
    assert "as source" in skim("package", compiled / "several.so", "-o", bundle, "--source").succeeded()
    assert not (bundle / "lib" / "libskimtvm_c.so").exists()
    configure = ["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={bundle}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    np.zeros((3, 3, 16, 16), "f4").tofile(tmp_path / "x.bin")
    done = run(tmp_path / "build" / "run_model", bundle / "several.so", 1, 3, 1, "out", "x.bin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_valgrind_finds_nothing_in_load_run_unload(skim, onnx_file, program, tmp_path):
    """AVX2: valgrind does not know AVX-512."""
    skim("compile", onnx_file, "-o", tmp_path / "m.so", "--batch", "1,2", "--target", "x86-64-v3").succeeded()
    np.zeros((3, 3, 16, 16), "f4").tofile(tmp_path / "x.bin")
    check = [
        "valgrind",
        "--error-exitcode=9",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite,indirect,possible",
    ]
    done = subprocess.run(
        [*check, program, "m.so", "1", "3", "100", "out", "x.bin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_contents(bundle, compiled):
    files = {str(f.relative_to(bundle)) for f in bundle.rglob("*") if f.is_file()}
    libraries = {f"lib/lib{name}.so" for name in ("skimtvm_c", "tvm_runtime", "tvm_ffi")}
    assert files >= libraries | {"several.so", "bundle.json", "include/skimtvm.h", "cmake/skimtvm-config.cmake"}
    assert any(f.startswith("licenses/apache-tvm") for f in files)
    assert (bundle / "several.so").read_bytes() == (compiled / "several.so").read_bytes()
    about = json.loads((bundle / "bundle.json").read_text())
    assert about["batches"] == [1, 4] and about["inputs"][0]["name"] == "data"
    assert sum(f.stat().st_size for f in bundle.rglob("*.so")) - (bundle / "several.so").stat().st_size < 8e6
    header = (bundle / "include" / "skimtvm.h").read_text()
    assert "source that you trust" in " ".join(header.replace("*", "").split())


@needs_gxx
def test_header_is_c(bundle, tmp_path):
    (tmp_path / "a.c").write_text("#include <skimtvm.h>\nint main(void) { return skimtvm_input_count(0); }\n")
    gcc = shutil.which("gcc") or pytest.skip("gcc is not installed")
    flags = ["-std=c99", "-pedantic", "-Wall", "-Werror", f"-I{bundle}/include", "-c", "-o", tmp_path / "a.o"]
    subprocess.run([gcc, *flags, tmp_path / "a.c"], check=True)


def test_output_that_exists_is_kept(skim, compiled, tmp_path):
    module, mine = compiled / "one.so", tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("x")
    skim("package", module, "-o", mine).failed(5, "exists; choose another name or pass --overwrite")
    skim("package", module, "-o", mine, "--overwrite").failed(5, "is not a bundle; it will not be replaced")
    assert os.listdir(mine) == ["precious"] and os.listdir(tmp_path) == ["mine"]
    skim("package", module, "-o", tmp_path / "b", "--source").succeeded()
    skim("package", module, "-o", tmp_path / "b", "--source", "--overwrite").succeeded()
    assert sorted(os.listdir(tmp_path)) == ["b", "mine"]
    skim("package", module, "-o", tmp_path / "no" / "b").failed(5, "there is no folder")


def test_what_is_no_module(skim, compiled, tmp_path):
    cut = tmp_path / "cut.so"
    cut.write_bytes((compiled / "one.so").read_bytes()[:-5])
    skim("package", cut, "-o", tmp_path / "b").failed(6, "truncated")
    skim("package", tmp_path / "none.so", "-o", tmp_path / "b").failed(6, "cannot be read")
    assert os.listdir(tmp_path) == ["cut.so"]


def test_without_a_compiler_the_source_is_shipped(skim, compiled, tmp_path):
    (tmp_path / "bin").mkdir()
    done = skim("package", compiled / "one.so", "-o", tmp_path / "b", PATH=str(tmp_path / "bin"), CXX="")
    assert done.code == 0 and "warning: no C++ compiler here" in done.err
    assert (tmp_path / "b" / "src" / "tvm" / "ffi" / "c_api.h").is_file()


def test_compiler_that_fails_is_an_error(skim, compiled, tmp_path):
    (tmp_path / "bin").mkdir()
    bad = {"PATH": str(tmp_path / "bin"), "CXX": "/bin/false"}
    skim("package", compiled / "one.so", "-o", tmp_path / "b", **bad).failed(8, "no working C++ compiler", "--source")
    assert os.listdir(tmp_path) == ["bin"]


# ---- the C interface -------------------------------------------------------------------------------------------------

PRELUDE = """
import ctypes as C, sys, threading
lib = C.CDLL(sys.argv[1] + "/lib/libskimtvm_c.so")
lib.skimtvm_last_error.restype = C.c_char_p
class Buffer(C.Structure): _fields_ = [("data", C.c_void_p), ("bytes", C.c_size_t)]
class Info(C.Structure):
    _fields_ = [("name", C.c_char_p), ("dtype", C.c_char_p), ("shape", C.POINTER(C.c_int64)), ("rank", C.c_int32),
                ("bytes", C.c_size_t)]
def create(path, threads=1):
    m = C.c_void_p()
    return lib.skimtvm_create(path.encode(), threads, C.byref(m)), m
def run(m, images, a, b):
    given, wanted = Buffer(C.addressof(a), len(a)), Buffer(C.addressof(b), len(b))
    return lib.skimtvm_run(m, C.c_int64(images), C.byref(given), C.byref(wanted))
def text(): return lib.skimtvm_last_error().decode()
"""


def c_interface(bundle, body, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + body, str(bundle), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_instance_for_each_thread(bundle):
    body = """
data = [C.create_string_buffer(bytes(range(i, i + 48)) * 64, 3072) for i in range(4)]
def work(k, runs):
    code, m = create(sys.argv[2], 1 + k % 2)
    assert code == 0, text()
    out = C.create_string_buffer(40)
    results = set()
    for _ in range(runs):
        assert run(m, 1, data[k], out) == 0, text()
        results.add(out.raw)
    lib.skimtvm_destroy(m)
    found[k] = results
found = {}
for k in range(4): work(k, 1)
alone, found = found, {}
threads = [threading.Thread(target=work, args=(k, 50)) for k in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert found == alone and len({frozenset(v) for v in found.values()}) == 4
import os, time
end = time.time() + 20  # a Python thread may outlive its join() by a moment
while len(os.listdir("/proc/self/task")) > 1 and time.time() < end: time.sleep(0.01)
assert len(os.listdir("/proc/self/task")) == 1, "threads are left"
assert sys.argv[2] not in open("/proc/self/maps").read(), "the module is still mapped"
print("ok")
"""
    assert c_interface(bundle, body, bundle / "several.so") == "ok\n"


def test_wrong_arguments_are_errors(bundle):
    body = """
code, m = create(sys.argv[2])
a, b, info = C.create_string_buffer(3072), C.create_string_buffer(40), Info()
def expect(code, part):
    assert code == 1 and part in text(), (code, text())
expect(lib.skimtvm_create(None, 1, C.byref(C.c_void_p())), "path is null")
expect(lib.skimtvm_create(b"x.so", 1, None), "instance is null")
expect(create(sys.argv[2], -1)[0], "threads")
expect(create(sys.argv[2], 5000)[0], "threads")
expect(lib.skimtvm_run(None, C.c_int64(1), None, None), "instance is null")
expect(lib.skimtvm_run(m, C.c_int64(1), None, None), "inputs is null")
expect(run(m, 0, a, b), "images"); expect(run(m, -3, a, b), "images")
expect(run(m, 2, a, b), "3072 bytes; the module expects 6144")
expect(run(m, 2**62, a, b), "too many"); expect(run(m, 1, a, C.create_string_buffer(44)), "output 'logits' has 44 bytes")
expect(lib.skimtvm_run(m, C.c_int64(1), C.byref(Buffer(None, 3072)), C.byref(Buffer(C.addressof(b), 40))), "is null")
expect(lib.skimtvm_input_info(m, 1, C.byref(info)), "there is no input 1")
expect(lib.skimtvm_output_info(m, -1, C.byref(info)), "no output -1")
expect(lib.skimtvm_input_info(m, 0, None), "info is null")
assert lib.skimtvm_input_info(m, 0, C.byref(info)) == 0
print(info.name.decode(), info.dtype.decode(), info.shape[:info.rank], info.bytes)
sizes, n = C.POINTER(C.c_int64)(), C.c_int32()
assert lib.skimtvm_batches(m, C.byref(sizes), C.byref(n)) == 0
print(sizes[:n.value], lib.skimtvm_input_count(m), lib.skimtvm_output_count(m), lib.skimtvm_input_count(None))
assert run(m, 1, a, b) == 0
lib.skimtvm_destroy(m); lib.skimtvm_destroy(None)
"""
    out = c_interface(bundle, body, bundle / "several.so")
    assert out.splitlines() == ["data float32 [4, 3, 16, 16] 12288", "[1, 4] 1 1 0"]


def forged(whole, change):
    """The module with another manifest and valid checksums."""
    text_size, elf_size, *_ = FOOTER.unpack(whole[-FOOTER.size :])
    text = whole[elf_size + 8 : elf_size + 8 + text_size]
    text = change if isinstance(change, bytes) else json.dumps(change(json.loads(text))).encode()
    head = struct.pack("<QQII", len(text), elf_size, zlib.crc32(text), zlib.crc32(whole[:elf_size]))
    tail = whole[-12:]
    return whole[: elf_size + 8] + text + head + struct.pack("<I", zlib.crc32(head + tail)) + tail


def tampered(whole):
    elf_size = FOOTER.unpack(whole[-FOOTER.size :])[1]
    flips = [0, 5, 40, 58, 63, elf_size // 2, elf_size, elf_size + 20, *range(len(whole) - FOOTER.size, len(whole), 3)]
    for at in flips:
        yield f"bit of byte {at}", whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
    for size in (0, 3, 4, 64, 100, elf_size, elf_size + 8, len(whole) - FOOTER.size, len(whole) - 1):
        yield f"cut to {size}", whole[:size]
    yield "one byte more", whole + b"\0"
    for name, text in (("empty", b""), ("list", b"[]"), ("deep", b"[" * 200000), ("not UTF-8", b'{"target": "\xff"}')):
        yield name, forged(whole, text)
    yield "zero byte", forged(whole, b'{"target": "a\0b"}')

    def spec(**change):
        return lambda m: m | {"inputs": [m["inputs"][0] | change]}

    for name, edit in {
        "negative extent": spec(shape=[4, -3, 16, 16]),
        "huge shape": spec(shape=[4, 2**62, 2**62]),
        "text as extent": spec(shape=["4"]),
        "other dtype": spec(dtype="float128"),
        "number as name": spec(name=7),
        "batches down": lambda m: m | {"batches": [4, 1]},
        "no estimate": lambda m: m | {"seconds": []},
        "estimate below zero": lambda m: m | {"seconds": [-1.0, 1.0]},
        "another TVM": lambda m: m | {"tvm_version": "0.99.0"},
        "features are no list": lambda m: m | {"features": {"a": 1}},
    }.items():
        yield name, forged(whole, edit)


def test_tampered_modules_are_refused_with_a_reason(bundle, tmp_path):
    """By the C library and by Python's loader, which never maps them."""
    files = []
    for k, (name, content) in enumerate(tampered((bundle / "several.so").read_bytes())):
        (tmp_path / f"{k}.so").write_bytes(content)
        files.append((name, str(tmp_path / f"{k}.so")))
    (tmp_path / "list.json").write_text(json.dumps(files))
    body = """
import json
for name, path in json.load(open(sys.argv[2])):
    code, m = create(path)
    assert code == 2 and not m.value and path in text() and chr(10) not in text(), (name, code, text())
assert path not in open("/proc/self/maps").read()
print("ok")
"""
    assert c_interface(bundle, body, tmp_path / "list.json") == "ok\n"
    python = """
import json, sys, skimtvm
for name, path in json.load(open(sys.argv[1])):
    try: skimtvm.load(path)
    except skimtvm.errors.InvalidArtifact as e: assert path in str(e) and chr(10) not in str(e)
    else: raise SystemExit(f"{name} was loaded")
    assert path not in open("/proc/self/maps").read()
print("ok")
"""
    done = subprocess.run(
        [sys.executable, "-c", python, str(tmp_path / "list.json")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ok\n", done.stderr


def test_files_that_are_no_modules_and_another_cpu(bundle, tmp_path):
    whole = (bundle / "several.so").read_bytes()
    (tmp_path / "cpu.so").write_bytes(forged(whole, lambda m: m | {"features": ["avx1024"]}))
    (tmp_path / "m.bin").write_bytes(whole)
    os.mkfifo(tmp_path / "pipe.so")
    (tmp_path / "folder.so").mkdir()
    body = """
for name, code, part in (("cpu.so", 3, "this CPU lacks avx1024"), ("m.bin", 2, "must end in .so"),
                         ("none.so", 2, "No such file"),
                         ("pipe.so", 2, "not a regular file"), ("folder.so", 2, "not a regular file")):
    got, m = create(sys.argv[2] + "/" + name)
    assert got == code and part in text(), (name, got, text())
print("ok")
"""
    assert c_interface(bundle, body, tmp_path) == "ok\n"
