"""Constants, batch_norm and scale/shift chains."""

import numpy as np
import pytest
from tvm import relax

from skimtvm.relay_passes.fold_batch_norm import FoldBatchNorm
from skimtvm.relay_passes.fold_constants import FoldConstants
from skimtvm.relay_passes.fold_scale_shift import FoldScaleShift


def weights(call):
    return call.args[1].value.numpy()


def main_of(build, shape, dtype="float32"):
    """A module whose main is ``build(x)``."""
    import tvm

    bb, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType(shape, dtype))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(build(bb, x))
        bb.emit_func_output(out)
    assert isinstance(bb.get(), tvm.IRModule)
    return bb.get()


def c(array, dtype="float32"):
    return relax.const(np.asarray(array, dtype), dtype)


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        (relax.op.add, lambda a, b: a + b),
        (lambda a, b: relax.op.divide(a, relax.op.sqrt(b)), lambda a, b: a / np.sqrt(b)),
        (lambda a, b: relax.op.power(b, a), lambda a, b: b**a),
        (lambda a, b: relax.op.permute_dims(relax.op.reshape(a, (3, 2)), [1, 0]), lambda a, b: a.reshape(3, 2).T),
        (lambda a, b: relax.op.broadcast_to(relax.op.expand_dims(a, 0), (4, 2, 3)), lambda a, b: np.stack([a] * 4)),
        (lambda a, b: relax.op.concat([a, b], 1), lambda a, b: np.concatenate([a, b], 1)),
        (lambda a, b: relax.op.split(a, 3, 1)[1], lambda a, b: a[:, 1:2]),
        (lambda a, b: relax.op.take(a, c([2, 0], "int64"), 1), lambda a, b: a[:, [2, 0]]),
        (lambda a, b: relax.op.strided_slice(a, [1], [2], [-4], [-1]), lambda a, b: a[:, ::-1]),
        (lambda a, b: relax.op.astype(a, "int32"), lambda a, b: a.astype("int32")),
        (lambda a, b: relax.op.where(relax.op.isnan(a), a, b), lambda a, b: b),
        (lambda a, b: relax.op.mean(relax.op.exp(a), [0], True), lambda a, b: np.exp(a).mean(0, keepdims=True)),
        (lambda a, b: relax.op.zeros((2, 3), "float32"), lambda a, b: np.zeros((2, 3))),
        (lambda a, b: relax.op.full((2,), c(7.0), "float32"), lambda a, b: np.full(2, 7.0)),
        (lambda a, b: relax.op.erf(a), None),  # not in the table: folded by TVM
    ],
)
def test_fold_constants(net, rand, expr, want):
    a, b = rand(2, 3), np.abs(rand(2, 3)) + 1
    mod = main_of(lambda bb, x: bb.normalize(expr(c(a), c(b))), (1,))
    folded, (p,) = net.apply(mod, FoldConstants())
    assert p.rewrites >= 1 and net.ops(folded) == {}
    result = net.evaluate(folded, np.zeros(1, "float32"))[0]
    reference = want(a, b) if want else net.evaluate(mod, np.zeros(1, "float32"))[0]
    np.testing.assert_allclose(result, reference, rtol=1e-6)
    again = FoldConstants()
    again(folded)
    assert again.rewrites == 0


def test_big_broadcast_of_a_scalar_is_not_materialised(net):
    mod = main_of(
        lambda bb, x: relax.op.add(x, bb.emit(relax.op.broadcast_to(c(2.0), (1, 64, 32, 32)))), (1, 64, 32, 32)
    )
    folded, (p,) = net.apply(mod, FoldConstants())
    assert p.rewrites == 0 and net.ops(folded) == {"broadcast_to": 1, "add": 1}
    mod, _ = net.apply(folded)
    assert net.ops(mod) == {"add": 1} and tuple(net.calls(mod, "add")[0].args[1].value.shape) == ()


def test_shape_arithmetic_folds(net):
    mod = main_of(lambda bb, x: bb.normalize(relax.op.shape_to_tensor(bb.emit(relax.op.shape_of(x)))), (2, 5))
    folded, _ = net.apply(mod, FoldConstants())
    assert net.ops(folded) == {}
    assert net.evaluate(folded, np.zeros((2, 5), "float32"))[0].tolist() == [2, 5]


def test_a_module_without_anything_to_do_is_returned_unchanged(net):
    mod = main_of(lambda bb, x: relax.op.nn.relu(x), (1, 2))
    for p in (FoldConstants(), FoldBatchNorm(), FoldScaleShift()):
        assert p(mod).same_as(mod) and p.rewrites == 0


def bn(rand, channels):
    return {"g": rand(channels), "be": rand(channels), "m": rand(channels), "v": np.abs(rand(channels)) + 0.5}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_behind_conv(net, rand, bias, groups):
    w = rand(6, 8 // groups, 3, 3) * (np.random.default_rng(0).random((6, 8 // groups, 3, 3)) < 0.3)
    init = {"w": w.astype("float32"), "b": rand(6), **bn(rand, 6)}
    conv = net.node("Conv", "x w b" if bias else "x w", "c", pads=[1] * 4, group=groups)
    proto = net.model([conv, net.node("BatchNormalization", "c g be m v", "y")], [1, 8, 5, 5], init)
    mod, counts, _ = net.check(proto, FoldBatchNorm()) if not bias else net.check(proto)
    assert counts == {"nn.conv2d": 1, "add": 1}
    call = net.calls(mod, "nn.conv2d")[0]
    assert np.array_equal(weights(call) != 0, w != 0)
    assert call.span.source_name.name == "c"
    assert tuple(net.calls(mod, "add")[0].args[1].value.shape) == (1, 6, 1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_behind_conv_transpose(net, rand, groups):
    init = {"w": rand(8, 6 // groups, 3, 3), "b": rand(6), **bn(rand, 6)}
    deconv = net.node("ConvTranspose", "x w b", "c", strides=[2, 2], group=groups)
    proto = net.model([deconv, net.node("BatchNormalization", "c g be m v", "y")], [1, 8, 5, 5], init)
    _, counts, _ = net.check(proto)
    assert counts["nn.conv2d"] == counts["add"] == 4, "a convolution for each phase"
    assert "multiply" not in counts and "nn.conv2d_transpose" not in counts


def test_batch_norm_behind_dense(net, rand):
    init = {"w": rand(5, 8), "b": rand(5), **bn(rand, 5)}
    dense = net.node("Gemm", "x w b", "c", transB=1, alpha=0.5, beta=2.0)
    mod, counts, _ = net.check(net.model([dense, net.node("BatchNormalization", "c g be m v", "y")], [3, 8], init))
    assert counts == {"matmul": 1, "add": 1}
    assert tuple(net.calls(mod, "add")[0].args[1].value.shape) == (5,)


def test_batch_norm_without_a_layer_and_with_two_readers(net, rand):
    init = {"w": rand(8, 8, 1, 1), **bn(rand, 8)}
    nodes = [
        net.node("BatchNormalization", "x g be m v", "n"),
        net.node("Relu", "n", "r"),
        net.node("Conv", "r w", "c"),
    ]
    nodes += [net.node("BatchNormalization", "c g be m v", "k"), net.node("Add", "k c", "y")]
    _, counts, run = net.check(net.model(nodes, [1, 8, 4, 4], init))
    assert counts == {"nn.conv2d": 1, "multiply": 2, "add": 3, "nn.relu": 1}
    assert run[0].counts["FoldBatchNorm"] == 2


def test_exported_batch_norm_chain(net, rand):
    init = {"w": rand(6, 8, 3, 3), "b": rand(6), "m": rand(6, 1, 1), "s": rand(1, 6, 1, 1), "t": rand(6, 1, 1)}
    nodes = [net.node("Conv", "x w b", "c"), net.node("Sub", "c m", "d"), net.node("Mul", "s d", "e")]
    nodes += [net.node("Add", "t e", "f"), net.node("Div", "f s", "y")]
    proto = net.model(nodes, [1, 8, 5, 5], init)
    mod, counts, run = net.check(proto)
    assert counts == {"nn.conv2d": 1, "add": 1}
    assert run[0].counts["FoldScaleShift"] >= 4
    assert tuple(net.calls(mod, "add")[0].args[1].value.shape) == (1, 6, 1, 1)
    alone, _ = net.apply(net.load(proto), FoldConstants())
    alone, (p,) = net.apply(alone, FoldScaleShift())
    assert p.rewrites >= 4 and net.ops(alone) == {"nn.conv2d": 1, "add": 1}


def test_reversed_subtraction_behind_dense(net, rand):
    init = {"w": rand(8, 5), "k": rand(5), "s": np.float32(3)}
    nodes = [net.node("MatMul", "x w", "c"), net.node("Sub", "k c", "d"), net.node("Mul", "d s", "y")]
    _, counts, _ = net.check(net.model(nodes, [2, 8], init))
    assert counts == {"matmul": 1, "add": 1}


def test_spatial_constants_stay_outside_of_the_layer(net, rand):
    init = {"w": rand(6, 8, 1, 1), "s": rand(1, 1, 4, 4), "t": rand(1, 6, 4, 4)}
    nodes = [net.node("Conv", "x w", "c"), net.node("Mul", "c s", "d"), net.node("Add", "d t", "y")]
    _, counts, _ = net.check(net.model(nodes, [1, 8, 4, 4], init))
    assert counts == {"nn.conv2d": 1, "multiply": 1, "add": 1}


def test_scale_does_not_fold_into_a_layer_with_two_readers(net, rand):
    nodes = [net.node("Conv", "x w", "c"), net.node("Mul", "c s", "d"), net.node("Add", "d c", "y")]
    proto = net.model(nodes, [1, 8, 4, 4], {"w": rand(6, 8, 1, 1), "s": rand(6, 1, 1)})
    _, counts, _ = net.check(proto)
    assert counts == {"nn.conv2d": 1, "multiply": 1, "add": 1}


def test_affine_chain_in_front_of_an_activation_becomes_one_pair(net, rand):
    init = {k: rand(8, 1, 1) for k in "abcd"}
    nodes = [
        net.node("Mul", "x a", "p"),
        net.node("Sub", "p b", "q"),
        net.node("Mul", "q c", "r"),
        net.node("Add", "r d", "s"),
    ]
    _, counts, _ = net.check(net.model([*nodes, net.node("Relu", "s", "y")], [1, 8, 4, 4], init))
    assert counts == {"multiply": 1, "add": 1, "nn.relu": 1}


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_input_scale_and_shift(net, rand, pad, groups):
    init = {"w": rand(6, 8 // groups, 3, 3), "s": rand(8, 1, 1), "t": rand(8, 1, 1)}
    nodes = [
        net.node("Mul", "x s", "a"),
        net.node("Add", "a t", "b"),
        net.node("Conv", "b w", "y", pads=[pad] * 4, group=groups),
    ]
    _, counts, _ = net.check(net.model(nodes, [1, 8, 5, 5], init))
    assert counts == ({"nn.conv2d": 1, "add": 1} if pad == 0 else {"multiply": 1, "nn.conv2d": 1, "add": 1})
