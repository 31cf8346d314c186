"""Writes the model that the tests serve: ``python model.py OUT.onnx``.

x: f32[N,3,8,8], mask: i64[N,4] -> y: f32[N,5] (a convolution, relu, mean, sparse dense layer), sum: i64[N,4] (mask + mask)
"""

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def build():
    rng = np.random.default_rng(0)

    def weights(name, shape, density):
        w = rng.standard_normal(shape).astype("float32") * np.float32(0.3)
        w[rng.random(shape) >= density] = 0
        return numpy_helper.from_array(w, name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], name="mean"),
        helper.make_node("Flatten", ["c"], ["d"], name="flat"),
        helper.make_node("Gemm", ["d", "w2"], ["y"], name="dense", transB=1),
        helper.make_node("Add", ["mask", "mask"], ["sum"], name="twice"),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "served",
        [info("x", TensorProto.FLOAT, ["N", 3, 8, 8]), info("mask", TensorProto.INT64, ["N", 4])],
        [info("y", TensorProto.FLOAT, ["N", 5]), info("sum", TensorProto.INT64, ["N", 4])],
        [weights("w1", (16, 3, 3, 3), 1), weights("w2", (5, 16), 0.3)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    onnx.save(build(), sys.argv[1])
