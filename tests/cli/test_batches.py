"""``--batch 1,4``: the command line of modules with several batch sizes."""

import json

import numpy as np
import pytest


def test_run_takes_any_number_of_images(skim, several, tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype("f4")
    for n in (1, 5):
        np.save(tmp_path / "x.npy", x[:n])
        skim("run", several, "--input", f"data={tmp_path / 'x.npy'}", "--output-dir", tmp_path / f"out{n}").succeeded()
    five, one = (np.load(tmp_path / f"out{n}" / "logits.npy") for n in (5, 1))
    assert five.shape == (5, 10)
    np.testing.assert_allclose(five[:1], one, rtol=1e-5, atol=1e-6)


def test_inspect_names_the_sizes(skim, several):
    out = skim("inspect", several).succeeded()
    assert "batches  1, 4; layers and shapes are those of 4\n" in out and "--batch=1,4" in out
    document = json.loads(skim("inspect", several, "--json").succeeded())
    assert document["batches"] == [1, 4] and [v["batch"] for v in document["variants"]] == [1]


def test_profile_of_one_size(skim, several):
    macs = {}
    for n in (1, 4):
        text = skim("profile", several, "--batch", n, "--repeat", "2", "--json").succeeded()
        macs[n] = sum(layer["macs"] for layer in json.loads(text)["layers"])
    assert macs[4] == 4 * macs[1] > 0
    skim("profile", several, "--batch", 3).failed(2, "does not hold batch 3; it holds 1, 4")


@pytest.mark.parametrize("batch", ["0", "1,", "1,x", "-1", "1.5", "1,0"])
def test_batches_that_are_none(skim_here, onnx_file, tmp_path, batch):
    skim_here("compile", onnx_file, "-o", tmp_path / "m.so", "--batch", batch).failed(2, "--batch")
