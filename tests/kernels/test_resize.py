"""Resizing: tables against ONNX Runtime, kernels against NumPy."""

import itertools

import numpy as np
import pytest

from skimtvm.errors import InternalError, UnsupportedWorkload
from skimtvm.layout import Halo, Space, natural, plane
from skimtvm.ops.packing import check_output, pack, run_kernel
from skimtvm.schedules.resize import COORDINATES, NEAREST, AxisTable, ResizeWorkload, axis_table, emit_resize
from skimtvm.target import TARGETS

LANES = {8: TARGETS["haswell"], 16: TARGETS["znver4"]}
by_lanes = pytest.mark.parametrize("lanes", LANES, ids="{}lanes".format)


def reference(x, wl):
    rows, columns = wl.rows, wl.columns
    if not wl.linear:
        return x[:, :, list(rows.low)][:, :, :, list(columns.low)]
    x = x.astype(np.float64)
    weight = np.array(rows.weight)[:, None]
    x = x[:, :, list(rows.low)] * (1 - weight) + x[:, :, list(rows.high)] * weight
    weight = np.array(columns.weight)
    return x[..., list(columns.low)] * (1 - weight) + x[..., list(columns.high)] * weight


@by_lanes
@pytest.mark.parametrize("linear", [False, True], ids=["nearest", "linear"])
@pytest.mark.parametrize(
    "shape, out",
    [
        ((1, 3, 4, 7), (8, 14)),
        ((3, 2, 5, 17), (15, 51)),
        ((1, 2, 6, 13), (5, 9)),
        ((1, 1, 1, 1), (4, 4)),
        ((2, 2, 3, 35), (4, 70)),
        ((1, 2, 3, 300), (3, 300)),
    ],
    ids=str,
)
def test_resize(shape, out, linear, lanes):
    n, c, h, w = shape
    wl = ResizeWorkload(axis_table(h, out[0], linear=linear), axis_table(w, out[1], linear=linear))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    src = plane(n, c, h, w, Space(w + 1, h + 1), Halo(1, 1, 1, 1))
    for dst in (natural(n, c, *out), plane(n, c, *out, Space(out[1] + 1, out[0] + 1), Halo(1, 1, 1, 1))):
        func = emit_resize(wl, src, dst, src_size=src.size, dst_size=dst.size, target=LANES[lanes])
        got = run_kernel(func, [pack(x, src, fill=np.nan), *wl.constants()], dst.size, LANES[lanes])
        check_output(got, reference(x, wl), dst, rtol=1e-5, atol=1e-6)


@by_lanes
def test_resize_between_slices(lanes):
    wl = ResizeWorkload(axis_table(3, 6, coordinates="asymmetric"), axis_table(5, 10, coordinates="asymmetric"))
    x = np.random.default_rng(2).standard_normal((1, 2, 3, 5)).astype(np.float32)
    src = natural(1, 2, 3, 5)
    dst = plane(1, 2, 6, 10, Space(11, 7), Halo(1, 1, 1, 1))
    size = dst.with_channels(6).size
    func = emit_resize(wl, src, dst, src_size=75, dst_size=size, src_channel=3, dst_channel=2, target=LANES[lanes])
    got = run_kernel(func, [pack(x, src, size=75, channel=3), *wl.constants()], size, LANES[lanes])
    check_output(got, reference(x, wl), dst, channel=2)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", [*NEAREST, "linear"])
def test_tables_agree_with_onnx_runtime(coordinates, mode):
    ort = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    for size, scale in itertools.product((1, 5, 8), (0.7, 1.0, 2.0, 2.7, 3.0)):
        out = int(size * scale)
        if not out:
            continue
        linear = mode == "linear"
        modes = {"mode": "linear"} if linear else {"mode": "nearest", "nearest_mode": mode}
        node = helper.make_node(
            "Resize", ["x", "", "scales"], ["y"], coordinate_transformation_mode=coordinates, **modes
        )
        scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, scale, scale])
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, size, size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [scales],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        x = np.random.default_rng(size).standard_normal((1, 1, size, size)).astype(np.float32)
        (want,) = session.run(None, {"x": x})
        table = axis_table(
            size,
            out,
            float(np.float32(scale)),
            coordinates=coordinates,
            linear=linear,
            **({} if linear else {"nearest": mode}),
        )
        np.testing.assert_allclose(reference(x, ResizeWorkload(table, table)), want, rtol=1e-5, atol=1e-5)


def test_tables_and_modes_that_do_not_fit_are_refused():
    lay = natural(1, 1, 2, 2)
    with pytest.raises(InternalError, match="reads outside"):
        emit_resize(
            ResizeWorkload(AxisTable((0, 2)), AxisTable((0, 1))), lay, lay, src_size=4, dst_size=4, target=LANES[16]
        )
    with pytest.raises(UnsupportedWorkload, match="tf_crop_and_resize"):
        axis_table(4, 8, coordinates="tf_crop_and_resize")
