"""Transposes of NHWC networks and channel shuffles."""

import numpy as np
import pytest

NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


def conv(net, x, y, w, **attrs):
    """An NHWC convolution as exporters write it."""
    return [
        net.node("Transpose", x, f"{y}_i", perm=NCHW),
        net.node("Conv", f"{y}_i {w}", f"{y}_c", **attrs),
        net.node("Transpose", f"{y}_c", y, perm=NHWC),
    ]


def test_residual_network_in_nhwc(net, rand):
    init = {
        "w1": rand(8, 3, 3, 3),
        "w2": rand(8, 8, 1, 1),
        "b": rand(8),
        "s": rand(1, 1, 1, 8),
        "m": rand(3),
        "f": rand(8, 5),
        "ax": np.array([1, 2]),
    }
    nodes = [
        net.node("Sub", "x m", "x0"),
        *conv(net, "x0", "a", "w1", pads=[1] * 4),
        net.node("Add", "a b", "a1"),
        net.node("Relu", "a1", "a2"),
        *conv(net, "a2", "c", "w2"),
        net.node("Mul", "c s", "c1"),
        net.node("Add", "c1 a2", "d"),
        net.node("Relu", "d", "d1"),
        net.node("ReduceMean", "d1 ax", "e", keepdims=0),
        net.node("MatMul", "e f", "y"),
    ]
    mod, counts, _ = net.check(net.model(nodes, [1, 9, 9, 3], init, opset=18))
    assert counts == {"permute_dims": 1, "nn.conv2d": 2, "add": 3, "nn.relu": 2, "mean": 1, "matmul": 1}
    assert tuple(int(d) for d in net.calls(mod, "permute_dims")[0].args[0].ty.shape.values) == (1, 9, 9, 3)


def test_squeeze_excite_and_concat_in_nhwc(net, rand):
    init = {"w1": rand(8, 3, 1, 1), "w2": rand(4, 8, 1, 1), "w3": rand(8, 4, 1, 1), "shape": np.array([1, 1, 1, 8])}
    nodes = [
        *conv(net, "x", "a", "w1"),
        net.node("ReduceMean", "a", "p", axes=[1, 2], keepdims=0),
        net.node("Reshape", "p shape", "q"),
        *conv(net, "q", "r", "w2"),
        net.node("Relu", "r", "r1"),
        *conv(net, "r1", "t", "w3"),
        net.node("Sigmoid", "t", "t1"),
        net.node("Mul", "a t1", "u"),
        net.node("Concat", "u a", "v", axis=3),
        net.node("Split", "v", "g h", axis=-1),
        net.node("Mul", "g h", "k"),
        net.node("Softmax", "k", "o", axis=-1),
        net.node("Transpose", "o", "y", perm=NCHW),
    ]
    _, counts, _ = net.check(net.model(nodes, [1, 6, 6, 3], init, opset=13))
    assert counts["permute_dims"] == 1
    assert counts["matmul"] == 2 and counts["nn.conv2d"] == 1


def test_padding_slices_and_reductions_in_nhwc(net, rand):
    init = {
        "w": rand(8, 3, 3, 3),
        "p": np.array([0, 1, 2, 0, 0, 2, 1, 0]),
        "b": np.array([2]),
        "e": np.array([7]),
        "ax": np.array([-1]),
    }
    nodes = [
        net.node("Pad", "x p", "x0"),
        *conv(net, "x0", "a", "w"),
        net.node("Slice", "a b e ax", "c"),
        net.node("ReduceMax", "c", "d", axes=[3], keepdims=1),
        net.node("Mul", "d c", "f"),
        net.node("Pad", "f p", "g"),
        net.node("Transpose", "g", "y", perm=NCHW),
    ]
    mod, counts, _ = net.check(net.model(nodes, [1, 6, 7, 3], init))
    assert counts == {"permute_dims": 1, "nn.conv2d": 1, "strided_slice": 1, "max": 1, "multiply": 1, "nn.pad": 1}
    assert [int(p) for p in net.calls(mod, "nn.conv2d")[0].attrs.padding] == [1, 2, 2, 1]


def test_pointwise_matmul_and_flatten_dense_in_nhwc(net, rand):
    init = {"w": rand(8, 3, 3, 3), "m": rand(8, 6), "b": rand(6), "shape": np.array([1, -1]), "f": rand(150, 4)}
    nodes = [
        *conv(net, "x", "a", "w", strides=[2, 2], pads=[1] * 4),
        net.node("MatMul", "a m", "c"),
        net.node("Add", "c b", "d"),
        net.node("Relu", "d", "e"),
        net.node("Reshape", "e shape", "g"),
        net.node("MatMul", "g f", "y"),
    ]
    mod, counts, _ = net.check(net.model(nodes, [1, 10, 10, 3], init))
    assert counts == {"permute_dims": 1, "nn.conv2d": 2, "add": 1, "nn.relu": 1, "reshape": 1, "matmul": 1}
    assert [call.span.source_name.name for call in net.calls(mod, "nn.conv2d")] == ["a_c", "c"]


def test_transposes_that_do_not_cancel_are_not_multiplied(net, rand):
    nodes = [
        net.node("Relu", "x", "r"),
        net.node("Transpose", "r", "t", perm=NHWC),
        net.node("Relu", "t", "a"),
        net.node("MatMul", "t t2", "b"),
        net.node("Softmax", "a", "y", axis=3),
    ]
    proto = net.model(nodes, [1, 4, 5, 5], inputs={"t2": [1, 5, 4, 5]}, outputs=("y", "b"))
    _, counts, _ = net.check(proto)
    assert counts["permute_dims"] <= 1


def test_grey_input_is_a_reshape(net, rand):
    _, counts, _ = net.check(net.model(conv(net, "x", "y", "w"), [1, 6, 6, 1], {"w": rand(8, 1, 3, 3)}))
    assert counts == {"reshape": 1, "nn.conv2d": 1, "permute_dims": 1}


@pytest.mark.parametrize("groups", [2, 3])
def test_channel_shuffle(net, rand, groups):
    init = {"w": rand(6, 6 // groups, 1, 1), "s": np.array([2, groups, 6 // groups, 5, 5]), "t": np.array([2, 6, 5, 5])}
    nodes = [
        net.node("Conv", "x w", "c", group=groups),
        net.node("Reshape", "c s", "a"),
        net.node("Transpose", "a", "b", perm=[0, 2, 1, 3, 4]),
        net.node("Reshape", "b t", "d"),
        net.node("Relu", "d", "y"),
    ]
    mod, counts, run = net.check(net.model(nodes, [2, 6, 5, 5], init))
    assert counts == {"nn.conv2d": 1, "take": 1, "nn.relu": 1}
    assert run[0].counts["ChannelShuffle"] == 1
    index = net.calls(mod, "take")[0].args[1]
    assert str(index.ty.dtype) == "int64"
    assert index.value.numpy().tolist() == np.arange(6).reshape(groups, -1).T.reshape(-1).tolist()


def test_depth_to_space_is_not_a_channel_shuffle(net):
    _, counts, _ = net.check(net.model([net.node("DepthToSpace", "x", "y", blocksize=2)], [1, 8, 4, 4]))
    assert counts == {"reshape": 2, "permute_dims": 1}
