"""``skimtvm bench`` as users start it. Nothing here asserts a time."""

import json
from pathlib import Path

import pytest

import skimtvm
from skimtvm.bench import records


@pytest.fixture(scope="module")
def bench(skim, tmp_path_factory):
    """A benchmark of squeezenet with one repeat, in a folder."""
    folder = tmp_path_factory.mktemp("bench")
    args = ["--networks", "squeezenet", "--sparsity", "0.9", "--repeat", 1, "--warmup", 0, "--no-plots"]
    out = skim("bench", *args, "--peers", "onnxruntime,deepsparse", "--output", folder).succeeded()
    assert "squeezenet 0.9 batch 1 threads 1: skimtvm" in out
    return folder


def test_json(bench):
    text = (bench / "bench.json").read_text()
    (row,) = json.loads(text)["networks"]
    assert {"network", "sparsity", "source", "batch", "threads", "terms", "nnz_macs", "engines"} <= set(row)
    assert {"cpu", "versions", "command", "date"} <= set(row["terms"])
    assert "--networks squeezenet" in row["terms"]["command"]
    engines = {e["engine"]: e for e in row["engines"]}
    assert set(engines) == {"skimtvm", "onnxruntime", "deepsparse"}
    ours = engines["skimtvm"]
    assert {"median_ms", "p10_ms", "p90_ms", "samples", "calls"} == set(ours["time"])
    assert ours["time"]["samples"] == 1
    assert ours["dense_gflops"] == pytest.approx(2e-6 * row["macs"] / ours["time"]["median_ms"])
    assert ours["gflops"] == pytest.approx(2e-6 * row["nnz_macs"] / ours["time"]["median_ms"])
    assert 0 < row["nnz_macs"] < row["macs"]
    assert "--deepsparse-python" in engines["deepsparse"]["status"] and engines["deepsparse"]["time"] is None
    assert records.Report.from_json(text).to_json() == text


def test_onnx_runtime_agrees(bench):
    (row,) = records.read(bench / "bench.json").networks
    peer = row.engines[1]
    if peer.status != records.OK:
        pytest.skip(peer.status)
    assert peer.difference < 1e-3


def test_markdown(bench):
    text = (bench / "bench.md").read_text()
    assert "| squeezenet | 0.9 | 1 | 1 |" in text and "## Terms" in text
    assert str(bench) not in text  # no folders of this machine


def test_readme_from_json(skim, bench, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- bench:start -->\n<!-- bench:end -->\n")
    skim("bench", "--render", bench / "bench.json", "--readme", readme).succeeded()
    assert "| squeezenet | 0.9 |" in readme.read_text()
    assert "| squeezenet | 0.9 |" in skim("bench", "--render", bench / "bench.json").succeeded()


def test_existing_results_stay(skim, bench):
    before = (bench / "bench.json").read_bytes()
    skim("bench", "--networks", "squeezenet", "--output", bench).failed(5, "bench.json", "--append", "--overwrite")
    assert (bench / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--networks", "lenet"), ("lenet", "bert", "squeezenet")),
        (("--networks", "resnet50,bert", "--sweep", "batch,size"), ("'bert' takes no images",)),
        (("--networks", "resnet50,bert", "--sparsity", "0.9,winograd:0.9"), ("'bert' has no convolutions",)),
        (("--networks", "resnet50,bert", "--sparsity", "seed"), ("'bert' has no table",)),
        (("--sparsity", "2"), ("sparsity '2'", "block4:0.9")),
        (("--layers", "--only", "conv"), ("conv", "3x3_64_64_56")),
        (("--peers", "tensorflow"), ("tensorflow",)),
        (("--threads", "0"), ("'0'",)),
        (("--render", "nothing.json"), ("nothing.json",)),
    ],
    ids=lambda v: v[-1],
)
def test_options_that_make_no_sense(skim_here, tmp_path, arguments, texts):
    skim_here("bench", *arguments, "--output", tmp_path / "out").failed(2, *texts)


def test_plots_without_matplotlib(skim, bench, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{Path(skimtvm.__file__).parent.parent}"
    done = skim("bench", "--render", bench / "bench.json", "--output", tmp_path / "out", PYTHONPATH=path)
    assert done.code == 0 and "skimtvm[plot]" in done.err
    assert (tmp_path / "out" / "bench.md").exists()


@pytest.mark.bench
def test_layers_and_sweeps(skim, tmp_path):
    common = ("--repeat", 1, "--warmup", 0, "--output", tmp_path, "--append", "--no-plots")
    skim("bench", "--layers", "--only", "3x3_512_512_7,winograd4_256_256_14,fc7_b1", *common).succeeded()
    skim("bench", "--networks", "squeezenet", "--sweep", "sparsity", "--values", "0.5", *common).succeeded()
    skim("bench", "--networks", "squeezenet", "--sweep", "size", "--values", "112,160", *common).succeeded()
    skim("bench", "--networks", "squeezenet", "--memory", *common).succeeded()
    skim("bench", "--networks", "bert", "--sweep", "batch", "--values", "2", *common).succeeded()
    skim("bench", "--networks", "bert", "--peers", "onnxruntime", *common).succeeded()
    report = records.read(tmp_path / "bench.json")
    (bert,) = report.networks  # no published sparsity: by default 0.9 alone
    assert (bert.network, bert.sparsity) == ("bert", "0.9") and bert.density == pytest.approx(0.1, abs=1e-4)
    assert bert.macs == 128 * 12 * 12 * 768**2 and bert.engines[1].difference < 1e-4
    assert [(r.batch, r.size) for r in report.sweeps if r.network == "bert"] == [(2, 128)]
    assert {r.layer for r in report.layers} == {"3x3_512_512_7", "winograd4_256_256_14", "fc7_b1"}
    native = next(r for r in report.layers if r.layer.startswith("winograd"))
    assert {e.model for e in native.engines if e.status == records.OK} == {"", "dense"}
    assert all(r.peak_gflops > 0 and r.alpha for r in report.layers)
    assert [r.size for r in report.sweeps if r.sweep == "size"] == [112, 160]
    assert {r.engine for r in report.memory} == {"skimtvm", "onnxruntime"}
