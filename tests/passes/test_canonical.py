"""Padding, pooling, dense forms, 1-D networks and LRN."""

import numpy as np
import pytest
from tvm import relax


def shapes(call):
    return tuple(int(d) for d in call.args[1].ty.shape.values)


def test_constants_of_elementwise_operators(net, rand):
    init = {"w": rand(4, 8, 1, 1), "k": rand(4, 1, 1), "two": np.full((1, 1, 1), 2, "float32"), "q": rand(4, 5, 5)}
    nodes = [
        net.node("Conv", "x w", "c"),
        net.node("Relu", "c", "r"),
        net.node("Add", "k r", "a"),
        net.node("Tanh", "a", "t"),
    ]
    nodes += [net.node("Div", "t two", "d"), net.node("Tanh", "d", "e"), net.node("Sub", "e q", "y")]
    mod, _, _ = net.check(net.model(nodes, [1, 8, 5, 5], init))
    assert [shapes(call) for call in net.calls(mod, "add")] == [(1, 4, 1, 1), (1, 4, 5, 5)]
    assert [shapes(call) for call in net.calls(mod, "multiply")] == [()]


def test_a_divisor_without_a_normal_reciprocal_stays(net):
    proto = net.model([net.node("Div", "x k", "y")], [1, 4], {"k": np.full(4, 3e38, "float32")})
    assert net.check(proto)[1] == {"divide": 1}


def test_constants_broadcast_over_pixels_are_narrowed(net, rand):
    init = {
        "k": np.broadcast_to(rand(4, 1, 1), (4, 5, 5)).copy(),
        "two": np.full((1, 1, 5, 5), 2, "float32"),
        "r": rand(1, 4, 1, 5),
    }
    nodes = [
        net.node("Tanh", "x", "t"),
        net.node("Add", "t k", "a"),
        net.node("Tanh", "a", "b"),
        net.node("Mul", "b two", "c"),
    ]
    nodes += [net.node("Tanh", "c", "d"), net.node("Add", "d r", "y")]
    mod, _, _ = net.check(net.model(nodes, [1, 4, 5, 5], init))
    assert [shapes(call) for call in net.calls(mod, "add")] == [(1, 4, 1, 1), (1, 4, 1, 5)]
    assert [shapes(call) for call in net.calls(mod, "multiply")] == [()]


@pytest.mark.parametrize("bias", [True, False])
def test_one_output_channel(net, rand, bias):
    init = {"w": rand(1, 4, 3, 3), "b": rand(1), "k": np.float32(3), "v": rand(25, 1), "s": np.array([1, -1])}
    nodes = [
        net.node("Conv", "x w b" if bias else "x w", "c", pads=[1] * 4),
        net.node("Add", "c k", "a"),
        net.node("Relu", "a", "r"),
    ]
    nodes += [net.node("Reshape", "r s", "f"), net.node("MatMul", "f v", "g"), net.node("Add", "g b", "y")]
    _, counts, _ = net.check(net.model(nodes, [1, 4, 5, 5], init))
    assert counts == {"nn.conv2d": 1, "add": 2, "nn.relu": 1, "reshape": 1, "matmul": 1}


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_auto_pad_goes_into_the_convolution(net, rand, auto_pad):
    proto = net.model(
        [net.node("Conv", "x w", "y", auto_pad=auto_pad, strides=[2, 2])], [1, 4, 7, 8], {"w": rand(4, 4, 3, 3)}
    )
    assert net.check(proto)[1] == {"nn.conv2d": 1}


@pytest.mark.parametrize(("value", "want"), [(0.0, {"nn.conv2d": 1}), (1.0, {"nn.pad": 1, "nn.conv2d": 1})])
def test_pad_before_convolution(net, rand, value, want):
    init = {"p": np.array([0, 0, 1, 0, 0, 0, 2, 3]), "v": np.float32(value), "w": rand(4, 4, 3, 3)}
    nodes = [net.node("Pad", "x p v", "a"), net.node("Conv", "a w", "y", pads=[1, 0, 0, 0])]
    mod, counts, _ = net.check(net.model(nodes, [1, 4, 6, 6], init))
    assert counts == want
    if value == 0:
        assert [int(p) for p in net.calls(mod, "nn.conv2d")[0].attrs.padding] == [2, 0, 2, 3]


@pytest.mark.parametrize(
    ("mode", "relu", "pool", "merged"),
    [
        ("constant", True, "MaxPool", True),
        ("constant", False, "MaxPool", False),
        ("edge", False, "MaxPool", True),
        ("constant", False, "AveragePool", True),
        ("edge", False, "AveragePool", False),
        ("reflect", False, "MaxPool", False),
    ],
)
def test_pad_before_pool(net, mode, relu, pool, merged):
    nodes = [net.node("Relu" if relu else "Tanh", "x", "r"), net.node("Pad", "r p", "a", mode=mode)]
    nodes += [net.node(pool, "a", "y", kernel_shape=[3, 3], strides=[2, 2])]
    _, counts, _ = net.check(net.model(nodes, [1, 4, 6, 6], {"p": np.array([0, 0, 1, 0, 0, 0, 0, 1])}))
    assert sum(counts.values()) == (2 if merged else 3)


@pytest.mark.parametrize(
    "nodes",
    [
        lambda n: [n("GlobalAveragePool", "x", "p"), n("Flatten", "p", "f")],
        lambda n: [n("AveragePool", "x", "p", kernel_shape=[6, 5]), n("Flatten", "p", "f")],
        lambda n: [n("AveragePool", "x", "p", kernel_shape=[7, 6], pads=[0, 0, 1, 1]), n("Flatten", "p", "f")],
        lambda n: [n("ReduceMean", "x", "f", axes=[-1, 2], keepdims=0)],
        lambda n: [n("ReduceMean", "x", "p", axes=[3, 2], keepdims=1), n("Flatten", "p", "f")],
    ],
)
def test_global_average_pool(net, rand, nodes):
    proto = net.model(
        [*nodes(net.node), net.node("Gemm", "f w b", "y")], [2, 4, 6, 5], {"w": rand(4, 3), "b": rand(3)}, opset=13
    )
    mod, counts, _ = net.check(proto)
    assert counts == {"mean": 1, "matmul": 1, "add": 1}
    mean = net.calls(mod, "mean")[0]
    assert [int(a) for a in mean.attrs.axis] == [2, 3] and not mean.attrs.keepdims


def test_convolution_of_its_whole_input_is_dense(net, rand):
    init = {"w": rand(6, 4, 3, 3), "b": rand(6), "v": rand(5, 6, 1, 1), "c": rand(5)}
    nodes = [
        net.node("Conv", "x w b", "fc1", strides=[2, 2]),
        net.node("Relu", "fc1", "r"),
        net.node("Conv", "r v c", "fc2"),
    ]
    mod, counts, _ = net.check(net.model([*nodes, net.node("Flatten", "fc2", "y")], [2, 4, 3, 3], init))
    assert counts == {"reshape": 1, "matmul": 2, "add": 2, "nn.relu": 1}
    assert [call.span.source_name.name for call in net.calls(mod, "matmul")] == ["fc1", "fc2"]
    assert [shapes(call) for call in net.calls(mod, "add")] == [(6,), (5,)]


def test_grouped_convolution_of_one_pixel_stays(net, rand):
    proto = net.model([net.node("Conv", "x w", "y", group=2)], [1, 4, 1, 1], {"w": rand(4, 2, 1, 1)})
    assert net.check(proto)[1] == {"nn.conv2d": 1}


def test_rows_of_a_matmul(net, rand):
    init = {"w": rand(8, 5), "b": rand(5)}
    nodes = [net.node("MatMul", "x w", "m"), net.node("Add", "m b", "a"), net.node("Relu", "a", "y")]
    mod, counts, _ = net.check(net.model(nodes, [2, 3, 8], init))
    assert counts == {"reshape": 2, "matmul": 1, "add": 1, "nn.relu": 1}
    assert len(net.calls(mod, "matmul")[0].args[0].ty.shape) == 2
    assert net.calls(mod, "matmul")[0].span.source_name.name == "m"


def test_one_dimensional_network(net, rand):
    init = {"w": rand(8, 4, 5), "b": rand(8), "v": rand(8, 8, 1), "s": rand(8), "f": rand(16, 3)}
    nodes = [
        net.node("Conv", "x w b", "c", pads=[2, 2], strides=[2]),
        net.node("BatchNormalization", "c s b b a", "n"),
        net.node("Relu", "n", "r"),
        net.node("MaxPool", "r", "p", kernel_shape=[3], strides=[2], pads=[1, 1]),
        net.node("Conv", "p v", "d"),
        net.node("Add", "d p", "e"),
        net.node("Concat", "e d", "g", axis=1),
        net.node("GlobalAveragePool", "g", "h"),
        net.node("Flatten", "h", "k"),
        net.node("MatMul", "k f", "y"),
    ]
    mod, counts, _ = net.check(net.model(nodes, [2, 4, 33], {**init, "a": np.abs(rand(8)) + 1}))
    want = {
        "reshape": 1,
        "nn.conv2d": 2,
        "add": 2,
        "nn.relu": 1,
        "nn.max_pool2d": 1,
        "concat": 1,
        "mean": 1,
        "matmul": 1,
    }
    assert counts == want
    assert [call.span.source_name.name for call in net.calls(mod, "nn.conv2d")] == ["c", "d"]


@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (3, 0.5), (3, 1.0)])
def test_lrn_is_outlined(net, size, beta):
    nodes = [net.node("LRN", "x", "n", size=size, alpha=2e-2, beta=beta, bias=1.5), net.node("Relu", "n", "y")]
    mod, counts, run = net.check(net.model(nodes, [1, 8, 5, 5]))
    assert counts == {"fn": 1, "nn.relu": 1} and run[0].counts["OutlineLRN"] == 1
    func = next(f for g, f in mod.functions.items() if g.name_hint != "main" and isinstance(f, relax.Function))
    assert (func.attrs["skim.op"], int(func.attrs["size"]), int(func.attrs["Primitive"])) == ("lrn", size, 1)
    found = [float(func.attrs[k]) for k in ("alpha", "beta", "bias")]
    assert found == pytest.approx([2e-2, beta, 1.5], rel=1e-6)


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "pads", "want"),
    [
        ((4, 4), (3, 3), 24, [24] * 4, (1, 1)),  # a pyramid on a small image
        ((5, 40), (3, 3), 6, [6] * 4, (1, 3)),
        ((5, 5), (3, 3), 4, [4] * 4, (3, 3)),  # corners are met
        ((3, 3), (5, 2), 1, [4, 1, 0, 0], (3, 2)),  # rows above the image, for each output
        ((2, 2), (3, 3), 1, [0, 0, 2, 2], (2, 2)),
        ((1, 8), (3, 3), 1, [1] * 4, (1, 3)),
    ],
)  # fmt: skip
def test_taps_that_meet_only_padding(net, rand, size, kernel, dilation, pads, want):
    node = net.node("Conv", "x w b", "y", pads=pads, dilations=[dilation] * 2, group=2)
    proto = net.model([node], [2, 4, *size], {"w": rand(6, 2, *kernel), "b": rand(6)})
    mod, counts, _ = net.check(proto)
    call = net.calls(mod, "nn.conv2d")[0]
    assert counts == {"nn.conv2d": 1, "add": 1} and shapes(call)[2:] == want
    assert call.span.source_name.name == "y"
