"""Networks whose 3x3 and 5x5 layers become native Winograd layers: the same function unpruned, and what is pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper

from skimtvm.bench.native_models import to_native
from skimtvm.bench.sparsity import Sparsity

from ..networks.graphs import Net, check


def small() -> Any:
    net = Net(1, 3, 14, 14)
    y = net.op("Relu", net.conv("x", 3, 8))  # the first: stays
    y = net.op("Relu", net.conv(y, 8, 8, groups=2))
    y = net.op("Relu", net.conv(y, 8, 6, 5, pads=[2] * 4))
    y = net.conv(y, 6, 8, strides=[2, 2])  # strided: stays
    return net.model(net.conv(y, 8, 4, 1, pads=[0] * 4))


def run(model: Any, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_without_pruning_it_is_the_same_function() -> None:
    model = small()
    x = np.random.default_rng(0).standard_normal((1, 3, 14, 14)).astype(np.float32)
    want = run(model, x)
    native = to_native(small(), 0.0, 0.0)
    assert [n.op_type for n in native.graph.node].count("Conv") == 3
    got = run(native, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_shares_of_zeros_and_numbers_of_the_compiled_network() -> None:
    native = to_native(small(), 0.9, 0.5)
    tensors = {t.name: numpy_helper.to_array(t) for t in native.graph.initializer}
    shares = {n.op_type: [] for n in native.graph.node}
    for n in native.graph.node:
        if len(n.input) > 1:
            w = tensors[n.input[1]]
            shares[n.op_type].append(1 - np.count_nonzero(w) / w.size)
    grouped, plain = shares["WinogradConv2d_F4x4_3x3"][0], shares["WinogradConv2d_F4x4_5x5"][0]
    assert abs(grouped - 0.95) < 0.01 and abs(plain - 0.9) < 0.01  # half of the first is zeros between groups
    assert shares["Conv"][0] == 0 and all(abs(s - 0.5) < 0.02 for s in shares["Conv"][1:])
    compiled = check(native)
    assert sum("winograd" in r.kernel for r in compiled.manifest.layers) == 2


def test_text_of_the_option() -> None:
    assert str(Sparsity.parse("winograd:0.9")) == "winograd:0.9"
