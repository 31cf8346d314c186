"""Every subcommand as a process: what it prints, the files it leaves, one line and an exit code for each error."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("skimtvm.compiler") is None, reason="the compiler is not part of this installation"
)


@pytest.fixture
def data_file(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((1, 3, 8, 8), "float32"))
    return tmp_path / "x.npy"


# ---- the command itself ------------------------------------------------------------------------------------------


def test_help_and_import_leave_tvm_alone(skim):
    assert all(name in skim("--help").succeeded() for name in ("compile", "run", "inspect", "profile", "demo"))
    text = (
        "import sys, skimtvm\n"
        "from click.testing import CliRunner\n"
        "from skimtvm.cli import main\n"
        "try: main(['compile', '--help'])\n"
        "except SystemExit as e: print('code', e.code)\n"
        "print([m for m in ('tvm', 'onnx', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("code 0\n[]\n")


def test_version(skim):
    assert skim("--version").succeeded().startswith("skimtvm, version 0.")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "Missing argument 'MODULE'; see: skimtvm run --help"),
        (["run", "m.so", "--output-dir", "o", "--input", "x.npy"], "'x.npy' is not NAME=FILE.npy"),
        (["run", "m.so", "--output-dir", "o", "--threads", "0"], "'0' is not a number from 1 to 1024"),
        (["profile", "m.so", "--repeat", "0"], "--repeat"),
        (["compile", "m.onnx", "-o", "m.so", "--batch", "0"], "--batch"),
        (["compile", "m.onnx", "-o", "m.so", "--input-shape", "x=1,a"], "must be whole numbers from 1"),
        (["compile", "m.onnx", "-o", "m.so", "--sparse-threshold", "7"], "--sparse-threshold"),
        (["compile", "m.onnx", "-o", "m.so", "--force", "conv1"], "'conv1' is not LAYER=KERNEL"),
        (["demo", "--sparsity", "2"], "neither seed nor none nor a fraction"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_usage_errors(skim, arguments, text):
    skim(*arguments).failed(2, text)


def test_a_bug_is_one_line_unless_debug(skim, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import skimtvm.artifact as a\ndef broken(*_, **__): raise ZeroDivisionError('oh')\na.read_manifest = broken\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = skim("inspect", module, PYTHONPATH=path)
    result.failed(70, "this is a bug in skimtvm", "ZeroDivisionError: oh", "skimtvm --debug")
    for result in (
        skim("--debug", "inspect", module, PYTHONPATH=path),
        skim("inspect", module, PYTHONPATH=path, SKIMTVM_DEBUG="1"),
    ):
        assert result.code == 70 and "Traceback" in result.err and "ZeroDivisionError" in result.err


def test_ctrl_c_is_130(skim, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import skimtvm.artifact as a\ndef stop(*_, **__): raise KeyboardInterrupt\na.read_manifest = stop\n"
    )
    result = skim("inspect", module, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert result.code == 130 and "Traceback" not in result.err


def test_closed_pipe_is_silent(module):
    command = f"{sys.executable} -m skimtvm inspect {module} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_commands_do_without_pytorch_and_users_processes_do_not(skim, module, data_file, tmp_path):
    """tvm-ffi imports it where it can, which takes longer than the import of TVM."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    skim("run", module, "--input", f"data={data_file}", "--output-dir", tmp_path / "out", PYTHONPATH=path).succeeded()
    text = f"import skimtvm; skimtvm.load({str(module)!r})"
    env = {**os.environ, "PYTHONPATH": path}
    mine = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=False)
    assert mine.returncode != 0 and "torch is imported" in mine.stderr


# ---- run ---------------------------------------------------------------------------------------------------------


def test_run(skim, module, data_file, tmp_path):
    out = tmp_path / "new" / "out"
    text = skim("run", module, "--input", f"data={data_file}", "--output-dir", out, "--threads", 2).succeeded()
    assert sorted(os.listdir(out)) == ["same.npy", "who_ids_0.npy", "y.npy"]
    np.testing.assert_array_equal(np.load(out / "same.npy"), np.load(data_file))
    assert len(set(np.load(out / "who_ids_0.npy"))) == 2
    assert f"y: float32[1,26000] -> {out / 'y.npy'}" in text

    again = ("run", module, "--input", f"data={data_file}", "--output-dir", out)
    skim(*again).failed(5, "y.npy' exists", "--overwrite")
    skim(*again, "--overwrite").succeeded()


@pytest.mark.parametrize(
    ("inputs", "code", "text"),
    [
        ([], 7, "input 'data' is missing; feed data: f32[1,3,8,8]"),
        (["data=none.npy"], 7, "cannot read 'none.npy': No such file"),
        (["data=text.npy"], 7, "not a NumPy array file; write it with numpy.save"),
        (["data=pickle.npy"], 7, "not a NumPy array file"),
        (["data=cut.npy"], 7, "not a NumPy array file"),
        (["data=many.npz"], 7, "is an .npz archive"),
        (["data=nhwc.npy"], 7, "got f32[1,8,8,3], module expects f32[1,3,8,8]; transpose to NCHW"),
        (["data=f64.npy"], 7, "convert with .astype(numpy.float32)"),
        (["dat=x.npy"], 7, "did you mean 'data'?"),
        (["data=x.npy", "data=x.npy"], 7, "is given 2 times"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_run_bad_input(skim_here, module, data_file, *, inputs, code, text):
    folder = data_file.parent
    (folder / "text.npy").write_text("1 2 3")
    np.save(folder / "pickle.npy", np.array([{}]), allow_pickle=True)
    (folder / "cut.npy").write_bytes(data_file.read_bytes()[:200])
    np.savez(folder / "many.npz", a=np.ones(3))
    np.save(folder / "nhwc.npy", np.ones((1, 8, 8, 3), "float32"))
    np.save(folder / "f64.npy", np.ones((1, 3, 8, 8)))
    flags = [flag for text in inputs for flag in ("--input", text)]
    skim_here("run", module, *flags, "--output-dir", "out", cwd=folder).failed(code, text)
    assert not (folder / "out").exists()


def test_run_output_folder_that_is_a_file(skim_here, module, data_file):
    skim_here("run", module, "--input", f"data={data_file}", "--output-dir", data_file).failed(5, "cannot be written")


def test_output_names_become_file_names(tmp_path):
    from skimtvm.cli.run import output_files

    names = ["a/b:0", "a_b_0", "../up", "", "Ünï", "A_B_0", "x" * 300]
    files = [f.name for f in output_files(tmp_path, names).values()]
    assert files[:6] == ["a_b_0.npy", "a_b_0_2.npy", "_up.npy", "output.npy", "Ünï.npy", "A_B_0_3.npy"]
    assert all(len(f.encode()) < 255 for f in files)


@pytest.mark.parametrize("command", ["run", "inspect", "profile"])
@pytest.mark.parametrize("kind", ["missing", "cut", "foreign", "flipped"])
def test_bad_module(skim_here, module, tmp_path, command, kind):
    path = tmp_path / "m.so"
    whole = bytearray(module.read_bytes())
    whole[9999] ^= kind == "flipped"
    if kind != "missing":
        path.write_bytes({"cut": whole[:-5], "foreign": b"hello", "flipped": whole}[kind])
    flags = ("--output-dir", tmp_path / "out") if command == "run" else ()
    text = {
        "missing": "No such file",
        "cut": "is truncated",
        "foreign": "not a SkimTVM module",
        "flipped": "is damaged",
    }
    skim_here(command, path, *flags).failed(6, text[kind])


# ---- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_module(skim, module):
    text = skim("inspect", module).succeeded()
    assert (
        "f32_dense" in text
        and "density 0.500" in text
        and "needs avx2, fma" in text
        and "data: float32[1,3,8,8]" in text
    )
    document = json.loads(skim("inspect", module, "--json").succeeded())
    assert document["layers"][0] | {"density": 0.5, "sparse": False} == document["layers"][0]
    assert document["calls"] == [0, 0, 1]


def test_inspect_onnx(skim, onnx_file):
    document = json.loads(skim("inspect", onnx_file, "--json").succeeded())
    layers = document["layers"]
    assert [(x["name"], x["op"], x["weights"]) for x in layers] == [
        ("conv1", "Conv", 432),
        ("conv2", "Conv", 4608),
        ("logits", "Gemm", 320),
    ]
    assert layers[0]["density"] == 1 and 0.08 < layers[1]["density"] < 0.12
    text = skim("inspect", onnx_file).succeeded()
    assert "32x16x3x3" in text and "3 layers with weights" in text


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 10, b"\x08\x07"])
def test_inspect_bad_onnx(skim_here, tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    skim_here("inspect", tmp_path / "m.onnx").failed(3, "is neither a module nor an ONNX model")


def test_inspect_onnx_without_its_weights(skim, onnx_file, tmp_path):
    import onnx

    model = onnx.load(onnx_file)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert "conv2" in skim("inspect", tmp_path / "m.onnx").succeeded()
    (tmp_path / "w.bin").unlink()
    skim("inspect", tmp_path / "m.onnx").failed(3, "m.onnx")


# ---- profile -----------------------------------------------------------------------------------------------------


def test_profile(skim, module):
    text = skim("profile", module, "--repeat", 2, "--threads", 1).succeeded()
    assert "f32_dense" in text and "1 thread," in text and "dense-equivalent" in text
    document = json.loads(skim("profile", module, "--repeat", 2, "--json").succeeded())
    assert [layer["name"] for layer in document["layers"]] == ["fc", "who"]
    assert document["total"]["samples"] == 2


# ---- compile and demo --------------------------------------------------------------------------------------------


@needs_compiler
def test_compile_run_and_compare(skim, onnx_file, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    so = tmp_path / "tiny.so"
    text = skim("compile", onnx_file, "-o", so, "--batch", 2, "--explain").succeeded()
    assert "conv2" in text and "3 layers with weights" in text
    assert os.listdir(tmp_path) == ["tiny.so"]
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    skim("run", so, "--input", f"data={tmp_path / 'x.npy'}", "--output-dir", tmp_path).succeeded()
    want = onnxruntime.InferenceSession(str(onnx_file)).run(None, {"data": x})[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), want, rtol=1e-3, atol=1e-4)

    before = so.read_bytes()
    skim("compile", onnx_file, "-o", so, "--batch", 2).failed(5, "exists")
    assert skim("compile", onnx_file, "-o", so, "--batch", 2, "--overwrite", "--quiet").succeeded() == ""
    assert so.read_bytes() == before  # the build is reproducible


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ([], 4),  # the batch is free
        (["--batch", "1", "--target", "z80"], 2),
        (["--batch", "1", "--force", "conv9=f32_dense"], 2),
        (["--batch", "1", "--force", "conv2=nonsense"], 2),
    ],
    ids=str,
)
def test_compile_errors(skim_here, onnx_file, tmp_path, flags, code):
    skim_here("compile", onnx_file, "-o", tmp_path / "m.so", *flags).failed(code)
    assert os.listdir(tmp_path) == []


@needs_compiler
def test_compile_missing_and_damaged_models(skim_here, onnx_file, tmp_path):
    skim_here("compile", tmp_path / "no.onnx", "-o", tmp_path / "m.so").failed(3, "no.onnx")
    (tmp_path / "cut.onnx").write_bytes(onnx_file.read_bytes()[:500])
    skim_here("compile", tmp_path / "cut.onnx", "-o", tmp_path / "m.so").failed(3)
    skim_here("compile", onnx_file, "-o", tmp_path / "m.bin").failed(2, "must end in .so")
    skim_here("compile", onnx_file, "-o", tmp_path / "no" / "m.so").failed(5, "there is no folder")


@needs_compiler
def test_python_interface_after_load(module, onnx_file, tmp_path):
    """compile() works although load() has brought TVM in without its compiler, and errors keep their class."""
    shutil.copy(onnx_file, tmp_path / "tiny.onnx")
    text = """
import sys, numpy, skimtvm
skimtvm.load(sys.argv[1])
m = skimtvm.compile(sys.argv[2], batch=1, input_shapes={"data": (1, 3, 16, 16)})
print(m.run(numpy.ones((1, 3, 16, 16), "f4"))["logits"].shape, m.manifest.model_name)
try: skimtvm.compile(open(sys.argv[2], "rb").read())
except skimtvm.errors.UnsupportedModel as e: print("refused")
try: skimtvm.compile(sys.argv[2], bach=1)
except skimtvm.errors.InvalidOption as e: print(e)
"""
    args = [sys.executable, "-c", text, str(module), str(tmp_path / "tiny.onnx")]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("(1, 10)") and lines[1] == "refused" and "bach" in lines[2]


@needs_compiler
@pytest.mark.slow
def test_demo(skim, tmp_path):
    so = tmp_path / "demo.so"
    text = skim("demo", "--network", "squeezenet", "--sparsity", "0.9", "--output", so, "--repeat", 3).succeeded()
    assert "verified against" in text and "times as fast" in text and so.exists()


@needs_compiler
def test_demo_unknown_network(skim):
    skim("demo", "--network", "skynet").failed(2, "network 'skynet' is not in the zoo")
