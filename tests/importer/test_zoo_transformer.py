"""The zoo's transformer encoder: reproducible weights, exact sparsity, healthy activations, any batch; its import."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from skimtvm import importer, zoo
from skimtvm.errors import InvalidOption
from skimtvm.zoo import transformer

SMALL = transformer.Encoder(layers=2, width=96, heads=4, feed_forward=200, tokens=24)
PARTS = ("attention.self.query", "attention.self.key", "attention.self.value",
         "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
LAYERS = [f"encoder.layer.{i}.{part}" for i in range(SMALL.layers) for part in PARTS]


def run(proto, x, outputs=None):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"embeddings": x})


def embeddings(encoder, batch=1):
    return np.random.default_rng(7).standard_normal((batch, encoder.tokens, encoder.width), dtype=np.float32)


def test_same_seed_same_model():
    a, b, c = (transformer.build(SMALL, 0.5, seed=seed) for seed in (0, 0, 1))
    assert a == b and a != c
    onnx.checker.check_model(a, full_check=True)
    for value, name in ((a.graph.input, "embeddings"), (a.graph.output, "output")):
        assert [v.name for v in value] == [name]
        assert [d.dim_value for d in value[0].type.tensor_type.shape.dim] == [1, 24, 96]


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_sparsity_is_exact_in_every_layer(sparsity):
    layers = zoo.weights(transformer.build(SMALL, sparsity))
    assert list(layers) == LAYERS
    shapes = [(96, 96)] * 4 + [(200, 96), (96, 200)]
    assert [w.shape for w in layers.values()] == shapes * 2  # output first
    for weight in layers.values():
        assert np.count_nonzero(weight == 0) == round(sparsity * weight.size)


def test_blocks_join_outputs_and_the_first_layer_stays_dense():
    """200 outputs are no multiple of 16: each last block has 8."""
    layers = list(zoo.weights(transformer.build(SMALL, 0.75, rows=16, keep_first=True)).values())
    assert layers[0].all()
    for weight in layers[1:]:
        blocks = [weight[k : k + 16] != 0 for k in range(0, len(weight), 16)]
        assert all((b.all(axis=0) | ~b.any(axis=0)).all() for b in blocks)
        dropped = sum(int((~b.any(axis=0)).sum()) for b in blocks)
        assert dropped == round(0.75 * len(blocks) * weight.shape[1])


def healthy(encoder, proto):
    """Nothing explodes or vanishes, and tokens stay apart."""
    names = [n.output[0] for n in proto.graph.node if n.op_type in ("LayerNormalization", "MatMul")]
    infos = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names[:-1])
    proto.graph.output.extend(infos)
    values = dict(zip(names, run(proto, embeddings(encoder), names), strict=True))
    rms = {name: float(np.sqrt(np.mean(np.square(v, dtype=np.float64)))) for name, v in values.items()}
    assert all(np.isfinite(v) for v in rms.values())
    norms = {v for n, v in rms.items() if "LayerNorm" in n or n == "output"}
    assert min(norms) > 0.9 and max(norms) < 1.1
    # Scores are divided by the root of the head's size afterwards, branches are smaller than what they are added to.
    rest = {n: v for n, v in rms.items() if "self.scores" not in n}
    assert min(rest.values()) > 0.15 and max(rest.values()) < 5, rest
    result = values["output"][0]
    assert result.std(axis=0).mean() > 0.3


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_activations_of_a_small_encoder(sparsity):
    healthy(SMALL, transformer.build(SMALL, sparsity))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [None, 0.9])
def test_activations_of_bert(sparsity):
    proto = zoo.build("bert", sparsity=sparsity)
    layers = zoo.weights(proto)
    assert len(layers) == 72 and sum(w.size for w in layers.values()) == 12 * 12 * 768**2
    healthy(zoo.TRANSFORMERS["bert"], proto)


def test_batch():
    """No constant holds the batch: the models differ in the declared shapes alone."""
    one, three = (transformer.build(SMALL, 0.5, batch=n) for n in (1, 3))
    assert [d.dim_value for d in three.graph.output[0].type.tensor_type.shape.dim] == [3, 24, 96]
    assert list(one.graph.node) == list(three.graph.node)
    assert list(one.graph.initializer) == list(three.graph.initializer)
    x = embeddings(SMALL, 3)
    want = np.concatenate([run(one, x[k : k + 1])[0] for k in range(3)])
    np.testing.assert_allclose(run(three, x)[0], want, atol=1e-5)


@pytest.mark.parametrize("batch", [None, 2])
def test_import(batch):
    got = importer.load_model(transformer.build(SMALL, 0.5), batch=batch)
    assert [s.shape for s in got.inputs] == [s.shape for s in got.outputs] == [(batch or 1, 24, 96)]
    names = [importer.layer_name(b.value) for b in got.mod["main"].body.blocks[0].bindings]
    assert [n for n in names if n in LAYERS] == LAYERS
    assert not got.warnings


@pytest.mark.parametrize("changes", [dict(heads=5), dict(layers=0), dict(tokens=-1)], ids=str)
def test_bad_sizes(changes):
    with pytest.raises(InvalidOption, match="width that its heads divide"):
        transformer.Encoder(**changes)
