"""TE definitions against their float64 references and scipy, the CSR formats, and the workloads they share."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from tvm import te

from skimtvm.errors import InternalError, UnsupportedWorkload
from skimtvm.formats import sell
from skimtvm.formats.csr import decode, encode, validate
from skimtvm.ops import conv2d, dense, lrn, pooling
from skimtvm.ops.packing import run_kernel
from skimtvm.target import TARGETS
from skimtvm.workload import ConvWorkload, DenseWorkload, LRNWorkload, PoolWorkload

TARGET = TARGETS["x86-64-v3"]
CONVS = [
    ConvWorkload(1, 4, 7, 7, 6, 3, 3, padding=(1, 1, 1, 1)),
    ConvWorkload(2, 3, 9, 5, 4, 3, 2, (2, 1), (0, 1, 2, 0), (1, 2)),
    ConvWorkload(1, 6, 8, 8, 9, 3, 3, (2, 2), (2, 2, 2, 2), (2, 2), groups=3),
    ConvWorkload(1, 5, 6, 4, 5, 3, 3, padding=(1, 1, 1, 1), groups=5),
    ConvWorkload(1, 8, 3, 3, 4, 1, 1),
    ConvWorkload(1, 3, 1, 1, 2, 1, 1),
]


def random(*shape, density=1.0):
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


def run(tensors, *arrays):
    shape = [int(d) for d in tensors[-1].shape]
    func = te.create_prim_func(tensors).with_attr("tirx.noalias", True)
    return run_kernel(func, arrays, tuple(shape), TARGET)


def scipy_conv(x, weight, wl):
    """Independent of the reference: one correlation per pair of channels."""
    from scipy.signal import correlate2d

    top, left, bottom, right = wl.padding
    xp = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    kernel = np.zeros((*weight.shape[:2], (wl.kh - 1) * wl.dilation[0] + 1, (wl.kw - 1) * wl.dilation[1] + 1))
    kernel[:, :, :: wl.dilation[0], :: wl.dilation[1]] = weight
    depth, outputs = wl.c // wl.groups, wl.k // wl.groups
    out = [
        [
            sum(correlate2d(image[k // outputs * depth + c], kernel[k, c], "valid") for c in range(depth))
            for k in range(wl.k)
        ]
        for image in xp
    ]
    return np.array(out)[:, :, :: wl.strides[0], :: wl.strides[1]]


@pytest.mark.parametrize("wl", CONVS, ids=str)
def test_conv2d(wl):
    x, weight = random(wl.n, wl.c, wl.h, wl.w), random(*wl.weight_shape)
    want = conv2d.conv2d_reference(x, weight, wl)
    np.testing.assert_allclose(want, scipy_conv(x, weight, wl), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(run(conv2d.conv2d(wl), x, weight), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.2], ids=["all-zero", "20%"])
@pytest.mark.parametrize("wl", CONVS, ids=str)
def test_csr_conv2d(wl, density):
    x, weight = random(wl.n, wl.c, wl.h, wl.w), random(*wl.weight_shape, density=density)
    weight[[0, -1]] = 0  # rows without entries at both ends
    m = encode(weight.reshape(wl.k, -1))
    indices, data = np.append(m.indices, np.int32(0)), np.append(m.data.ravel(), np.float32(np.nan))
    got = run(conv2d.csr_conv2d(wl, indices.size), x, m.indptr, indices, data)
    np.testing.assert_allclose(got, conv2d.conv2d_reference(x, weight, wl), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 32, 256])
@pytest.mark.parametrize(
    "shape,density", [((1, 1), 1.0), ((70, 40), 0.3), ((130, 300), 0.1), ((48, 500), 1.0), ((9, 7), 0.0)]
)
def test_sell_encodes_exactly(shape, density, window):
    matrix = random(*shape, density=density)
    matrix[::5] = 0  # rows of very different length
    m = sell.encode(matrix, 16, window)
    np.testing.assert_array_equal(sell.decode(m), matrix)
    assert (m.base >= 0).all() and (m.base <= max(0, shape[1] - window)).all()
    assert m.ip[-1] == m.bundles == len(m.index) == len(m.data)
    padded = np.arange(m.slices * m.lanes)
    assert (np.sort(m.order) == padded).all() and (m.order // sell.SIGMA == padded // sell.SIGMA).all()


def test_sell_pads_as_its_model_says():
    rng = np.random.default_rng(1)
    for density, window in ((0.02, 128), (0.05, 128), (0.1, 32), (0.1, 128), (0.2, 32), (0.35, 64)):
        matrix = (rng.random((256, 2048)) < density).astype(np.float32)
        stored = sell.encode(matrix, 16, window).data.size / np.count_nonzero(matrix)
        assert stored == pytest.approx(sell.stored_share(density * window), rel=0.15)
    with pytest.raises(InternalError, match="a float32 matrix"):
        sell.encode(np.zeros((2, 2)), 16, 32)
    with pytest.raises(InternalError, match="windows of 300"):
        sell.encode(np.zeros((2, 2), np.float32), 16, 300)


@pytest.mark.parametrize("wl", [DenseWorkload(1, 40, 9), DenseWorkload(3, 17, 5), DenseWorkload(1, 1, 1)], ids=str)
def test_dense(wl):
    x, weight = random(wl.m, wl.k), random(wl.k, wl.n, density=0.3)
    want = dense.dense_reference(x, weight)
    np.testing.assert_allclose(run(dense.dense(wl), x, weight), want, rtol=1e-4, atol=1e-5)
    weight[:, 0] = 0
    m = sell.encode(np.ascontiguousarray(weight.T), 4, 8)
    place = np.argsort(m.order)[: wl.n].astype(np.int32)
    got = run(dense.sell_dense(wl, m), x, place, m.ip, m.base, m.index, m.data)
    np.testing.assert_allclose(got, dense.dense_reference(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("include", [False, True], ids=["exclude-pad", "include-pad"])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(
    "ceil, kernel, strides, dilation, padding",
    [
        (False, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
        (True, (3, 3), (2, 2), (1, 1), (0, 1, 1, 0)),
        (True, (2, 3), (3, 2), (2, 2), (1, 2, 1, 2)),
    ],
    ids=["3x3-s2", "ceil", "dilated"],
)
def test_pool(ceil, kernel, strides, dilation, padding, kind, include):
    wl = PoolWorkload(kind, kernel, strides, dilation, padding, include)
    x = random(2, 3, 10, 12)
    out = wl.out_extent(10, 12, ceil=ceil)
    want = pooling.pool_reference(x, wl, out)
    np.testing.assert_allclose(run(pooling.pool(wl, x.shape, out), x), want, rtol=1e-5, atol=1e-6)


def onnx_run(op, x, **attributes):
    ort = pytest.importorskip("onnxruntime")
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", 1, list(x.shape))],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "AveragePool-include-pad"])
def test_pool_reference_agrees_with_onnx_runtime(op, ceil):
    """The conventions of padding, divisor and ceil mode are ONNX's."""
    name, include = op.split("-")[0], op.endswith("pad")
    for size, kernel, stride, padding in ((7, 3, 2, (0, 0, 0, 0)), (8, 3, 2, (1, 1, 1, 1)), (9, 2, 3, (0, 1, 1, 0))):
        x = random(1, 2, size, size + 1)
        wl = PoolWorkload(
            "max" if name == "MaxPool" else "avg", (kernel, kernel), (stride, stride), (1, 1), padding, include
        )
        extra = {"count_include_pad": int(include)} if name == "AveragePool" else {}
        want = onnx_run(
            name,
            x,
            kernel_shape=wl.kernel,
            strides=wl.strides,
            pads=padding,
            ceil_mode=int(ceil),
            **extra,
        )
        out = wl.out_extent(size, size + 1, ceil=ceil)
        assert out == want.shape[2:]
        np.testing.assert_allclose(pooling.pool_reference(x, wl, out), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wl", [LRNWorkload(5), LRNWorkload(4, 0.3, 0.6, 2.0), LRNWorkload(1, 1.0)], ids=str)
def test_lrn(wl):
    x = random(2, 7, 3, 4)
    want = lrn.lrn_reference(x, wl)
    np.testing.assert_allclose(run(lrn.lrn(wl, x.shape), x), want, rtol=1e-5)
    if wl.size % 2:  # ONNX Runtime takes odd sizes only
        theirs = onnx_run("LRN", x, size=wl.size, alpha=wl.alpha, beta=wl.beta, bias=wl.bias)
        np.testing.assert_allclose(want, theirs, rtol=1e-5)


@pytest.mark.parametrize("height", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (1, 1), (3, 40), (0, 4)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_sparse_formats_round_trip(shape, density, height):
    matrix = random(*shape, density=density)
    m = encode(matrix, height)
    validate(m)
    np.testing.assert_array_equal(decode(m), matrix)
    assert m.nnz == np.count_nonzero(matrix)
    if height == 1:
        want = sp.csr_matrix(matrix)
        assert (m.indptr == want.indptr).all() and (m.indices == want.indices).all()
        assert (m.data.ravel() == want.data).all() and m.fill == 1.0


@pytest.mark.parametrize(
    "field, change, message",
    [
        ("indptr", lambda a: a.astype(np.int64), "indptr is int64, not int32"),
        ("data", lambda a: a.astype(np.float64), "data is float64, not float32"),
        ("indptr", lambda a: a[:-1], "indptr has shape"),
        ("indptr", lambda a: a + np.int32(1), "indptr starts at 1"),
        ("indptr", lambda a: np.array([0, 3, 1, 2], np.int32), "indptr decreases after group 1"),
        ("indptr", lambda a: np.minimum(a, 1), "there are"),
        ("indices", lambda a: a + np.int32(100), "outside of the matrix"),
        ("indices", lambda a: a - np.int32(100), "outside of the matrix"),
        ("indices", lambda a: a * np.int32(0), "not ascending"),
        ("data", lambda a: a[:-1], "does not fit"),
        ("data", lambda a: np.ones_like(a), "behind the last one are not zero"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_invalid_encodings_are_refused(field, change, message):
    m = encode(random(5, 9, density=0.9), 2)
    bad = dataclasses.replace(m, **{field: change(getattr(m, field))})
    with pytest.raises(InternalError, match=message):
        decode(bad)


def test_encode_refuses_other_dtypes_and_ranks():
    with pytest.raises(InternalError, match="float64"):
        encode(np.zeros((2, 2)))
    with pytest.raises(InternalError, match="groups of 0 rows"):
        encode(np.zeros((2, 2), np.float32), 0)


def test_encode_drops_negative_zeros_and_keeps_nan():
    m = encode(np.array([[-0.0, np.nan, 1e-45]], np.float32))
    assert list(m.indices) == [1, 2] and np.isnan(m.data[0, 0]) and m.data[1, 0] == np.float32(1e-45)


def test_workloads():
    wl = ConvWorkload(1, 64, 56, 56, 64, 3, 3, padding=(1, 1, 1, 1))
    assert str(wl) == "1x64x56x56 * 64x64x3x3 s1 p1"
    assert (wl.out_h, wl.out_w, wl.macs) == (56, 56, 64 * 64 * 9 * 56 * 56)
    assert str(CONVS[2]) == "1x6x8x8 * 9x2x3x3 s2 p2 d2 g3"
    assert str(CONVS[1]) == "2x3x9x5 * 4x3x3x2 s2,1 p0,1,2,0 d1,2"
    assert str(DenseWorkload(1, 4096, 1000)) == "1x4096 * 4096x1000"
    for workload in (*CONVS, DenseWorkload(1, 2, 3), LRNWorkload(5)):
        copy = type(workload).from_json(workload.to_json())
        assert copy == workload and hash(copy) == hash(workload)
    with pytest.raises(UnsupportedWorkload, match="groups"):
        ConvWorkload(1, 5, 4, 4, 4, 1, 1, groups=2)
    with pytest.raises(UnsupportedWorkload, match="larger than the padded input"):
        ConvWorkload(1, 1, 2, 2, 1, 3, 3)
    with pytest.raises(UnsupportedWorkload, match="at least 1"):
        DenseWorkload(0, 1, 1)
