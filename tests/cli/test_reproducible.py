"""The same model, settings and tools give the same bytes, whatever else differs between two compilations."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess

import pytest


def test_two_compilations_give_the_same_bytes(skim, onnx_file, tmp_path):
    a, b = tmp_path / "a", tmp_path / "some" / "longer" / "folder"
    a.mkdir()
    b.mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    shutil.copy(onnx_file, b)
    skim("compile", onnx_file, "-o", "x.so", "--batch", "3", cwd=a, PYTHONHASHSEED="1").succeeded()
    other = {"PYTHONHASHSEED": "4242", "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path), "LC_ALL": "C", "TZ": "X"}
    skim("compile", onnx_file.name, "-o", "y.so", "--batch", "3", "--quiet", cwd=b, **other).succeeded()
    assert (a / "x.so").read_bytes() == (b / "y.so").read_bytes()
    assert os.listdir(tmp_path / "tmp") == []


def test_manifest_says_how_to_make_it_again(skim, onnx_file, tmp_path):
    module, again = tmp_path / "m.so", tmp_path / "again.so"
    options = ["--batch", "2", "--force", "conv2=dense", "--target", "x86-64-v3"]
    skim("compile", onnx_file, "-o", module, *options).succeeded()
    manifest = json.loads(skim("inspect", module, "--json").succeeded())
    assert manifest["model_sha256"] == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert {"apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "llvm", "linker"} <= set(manifest["tools"])
    line = next(x for x in skim("inspect", module).succeeded().splitlines() if x.startswith("again "))
    words = shlex.split(line.removeprefix("again"))
    assert words[:5] == ["skimtvm", "compile", "MODEL.onnx", "-o", "MODULE.so"]
    skim("compile", onnx_file, "-o", again, *words[5:]).succeeded()
    assert again.read_bytes() == module.read_bytes()


@pytest.mark.parametrize("tool", ["gcc", "ld"])
def test_manifest_names_the_linker_that_was_used(skim, onnx_file, tmp_path, tool):
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    (tmp_path / "bin").mkdir()
    for name in {tool, "ld", "as"}:
        if path := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(path)
    module = tmp_path / "m.so"
    skim("compile", onnx_file, "-o", module, "--batch", "1", PATH=str(tmp_path / "bin"), CC="", CXX="").succeeded()
    first = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    assert json.loads(skim("inspect", module, "--json").succeeded())["tools"]["linker"] == first
