"""Random small ONNX graphs, and random damage to ONNX models."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import onnx
from onnx import TensorProto as TP
from onnx import helper as h
from onnx import numpy_helper as nh

MOST = 4096  # elements of a value
UNARY = ("Relu", "Tanh", "Sigmoid", "Abs", "Neg", "Exp", "Erf", "Softplus", "HardSwish", "LeakyRelu", "Elu", "Floor")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")


class Builder:
    """A graph of opset 17 in the making: ``shapes`` of its values, all float32."""

    def __init__(self, rnd: Random) -> None:
        self.rnd, self.rng = rnd, np.random.default_rng(rnd.randrange(2**32))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.init: dict[str, np.ndarray] = {}

    def constant(self, array) -> str:
        name = f"k{len(self.init)}"
        self.init[name] = np.asarray(array)
        return name

    def weights(self, *shape: int) -> np.ndarray:
        values = self.rng.standard_normal(shape).astype(np.float32)
        if self.rnd.random() < 0.5:
            values[self.rng.random(shape) < 0.7] = 0  # pruned
        return values

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attrs) -> None:
        if 0 in shape or math.prod(shape) > MOST:
            return
        name = f"v{len(self.nodes)}"
        self.nodes.append(h.make_node(op, inputs, [name], **attrs))
        self.shapes[name] = shape

    def step(self) -> None:
        rnd = self.rnd
        x = rnd.choice(list(self.shapes)[-4:])
        s = self.shapes[x]
        kinds = [
            "unary",
            "binary",
            "binary_constant",
            "reshape",
            "transpose",
            "softmax",
            "reduce",
            "concat",
            "slice",
            "matmul",
        ]
        kinds += ["conv", "conv", "pool", "norm", "resize", "pad"] if len(s) == 4 else ["gemm"] if len(s) == 2 else []
        getattr(self, rnd.choice(kinds))(x, s)

    def unary(self, x, s):
        self.add(self.rnd.choice(UNARY), [x], s)

    def binary(self, x, s):
        y = self.rnd.choice(list(self.shapes))
        try:
            shape = np.broadcast_shapes(s, self.shapes[y])
        except ValueError:
            return
        self.add(self.rnd.choice(BINARY), [x, y] if self.rnd.random() < 0.5 else [y, x], tuple(shape))

    def constant_operand(self, s):
        shape = self.rnd.choice([s, (), (1,) * len(s), s[-1:], tuple(d if i == 1 else 1 for i, d in enumerate(s))])
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def binary_constant(self, x, s):
        self.add(self.rnd.choice(BINARY), [x, self.constant_operand(s)], s)

    def reshape(self, x, s):
        total = math.prod(s)
        divisors = [d for d in range(1, min(total, 64) + 1) if total % d == 0]
        first = self.rnd.choice(divisors)
        target = self.rnd.choice([(first, -1), (-1,), (1, first, -1), (s[0] if s else 1, -1), (1, first, -1, 1)])
        shape = tuple(total // math.prod(d for d in target if d > 0) if d == -1 else d for d in target)
        if total % max(1, math.prod(d for d in target if d > 0)) == 0:
            self.add("Reshape", [x, self.constant(np.array(target, np.int64))], shape)

    def transpose(self, x, s):
        perm = self.rnd.sample(range(len(s)), len(s))
        if perm:
            self.add("Transpose", [x], tuple(s[p] for p in perm), perm=perm)

    def softmax(self, x, s):
        if s:
            op = self.rnd.choice(["Softmax", "LogSoftmax"])
            self.add(op, [x], s, axis=self.rnd.randrange(-len(s), len(s)))

    def reduce(self, x, s):
        if not s:
            return
        op, keep = self.rnd.choice(REDUCE), self.rnd.randrange(2)
        axes = sorted(self.rnd.sample(range(len(s)), self.rnd.randint(1, len(s))))
        shape = tuple(1 if i in axes else d for i, d in enumerate(s) if keep or i not in axes)
        if op == "ReduceSum":
            self.add(op, [x, self.constant(np.array(axes, np.int64))], shape, keepdims=keep)
        else:
            self.add(op, [x], shape, axes=axes, keepdims=keep)

    def concat(self, x, s):
        if s:
            axis = self.rnd.randrange(len(s))
            fits = [
                y
                for y, t in self.shapes.items()
                if len(t) == len(s) and t[:axis] + t[axis + 1 :] == s[:axis] + s[axis + 1 :]
            ]
            y = self.rnd.choice(fits)
            shape = (*s[:axis], s[axis] + self.shapes[y][axis], *s[axis + 1 :])
            self.add("Concat", [x, y], shape, axis=axis)

    def slice(self, x, s):
        axes = [i for i, d in enumerate(s) if d > 1]
        if axes:
            axis = self.rnd.choice(axes)
            start, step = self.rnd.randrange(s[axis] - 1), self.rnd.choice([1, 1, 2])
            values = [self.constant(np.array([v], np.int64)) for v in (start, 2**31, axis, step)]
            length = -(-(s[axis] - start) // step)
            self.add("Slice", [x, *values], (*s[:axis], length, *s[axis + 1 :]))

    def matmul(self, x, s):
        if s:
            k = self.rnd.choice([1, 3, 8, 17])
            self.add("MatMul", [x, self.constant(self.weights(s[-1], k))], (*s[:-1], k))

    def gemm(self, x, s):
        k = self.rnd.choice([1, 5, 16])
        inputs = [x, self.constant(self.weights(k, s[1])), self.constant(self.weights(k))]
        self.add("Gemm", inputs, (s[0], k), transB=1)

    def conv(self, x, s):
        groups = self.rnd.choice([1, 1, s[1], 2 if s[1] % 2 == 0 else 1])
        out = groups * self.rnd.choice([1, 2, 4])
        kernel = [self.rnd.choice([1, 2, 3, 5]) for _ in range(2)]
        strides, dilations = (
            [self.rnd.choice([1, 1, 2]) for _ in range(2)],
            [self.rnd.choice([1, 1, 2]) for _ in range(2)],
        )
        pads = [self.rnd.choice([0, 1, 2]) for _ in range(4)]
        size = [
            (s[2 + i] + pads[i] + pads[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(2)
        ]
        if min(size) < 1 or any(s[2 + i] + pads[i] + pads[2 + i] <= dilations[i] * (kernel[i] - 1) for i in range(2)):
            return
        inputs = [x, self.constant(self.weights(out, s[1] // groups, *kernel))]
        if self.rnd.random() < 0.5:
            inputs.append(self.constant(self.weights(out)))
        attrs = {"group": groups, "strides": strides, "dilations": dilations, "pads": pads}
        self.add("Conv", inputs, (s[0], out, *size), **attrs)

    def pool(self, x, s):
        kernel = [self.rnd.choice([1, 2, 3]) for _ in range(2)]
        strides, pads = [self.rnd.choice([1, 2]) for _ in range(2)], [self.rnd.randrange(k) for k in kernel * 2]
        size = [(s[2 + i] + pads[i] + pads[2 + i] - kernel[i]) // strides[i] + 1 for i in range(2)]
        if any(s[2 + i] + pads[i] + pads[2 + i] < kernel[i] for i in range(2)):
            return
        attrs = {"kernel_shape": kernel, "strides": strides, "pads": pads}
        if self.rnd.random() < 0.5:
            self.add("MaxPool", [x], (*s[:2], *size), **attrs)
        else:
            self.add("AveragePool", [x], (*s[:2], *size), count_include_pad=self.rnd.randrange(2), **attrs)

    def norm(self, x, s):
        values = [self.constant(np.abs(self.weights(s[1])) + 0.5) for _ in range(4)]
        self.add("BatchNormalization", [x, *values], s)

    def resize(self, x, s):
        scale = [self.rnd.choice([0.5, 1.0, 1.3, 2.0]) for _ in range(2)]
        shape = (*s[:2], *(math.floor(d * np.float32(f)) for d, f in zip(s[2:], scale, strict=True)))
        if any(f != 1 and d == e for f, d, e in zip(scale, s[2:], shape[2:], strict=True)):
            return  # ONNX Runtime copies what keeps its size; the standard still moves pixels by the scale
        scales = self.constant(np.array([1, 1, *scale], np.float32))
        mode = self.rnd.choice(["nearest", "linear"])
        # ONNX Runtime's nearest differs from the standard for half_pixel with odd ratios; asymmetric is unambiguous.
        where = "asymmetric" if mode == "nearest" else self.rnd.choice(["half_pixel", "asymmetric", "align_corners"])
        if where == "align_corners" and any(d * f != e for f, d, e in zip(scale, s[2:], shape[2:], strict=True)):
            return  # where the scale gives no whole number, ONNX Runtime aligns to the size, the standard to the product
        attrs = {"nearest_mode": "floor"} if mode == "nearest" else {}
        self.add("Resize", [x, "", scales], shape, mode=mode, coordinate_transformation_mode=where, **attrs)

    def pad(self, x, s):
        widths = [0, 0, *(self.rnd.randrange(3) for _ in range(2))] * 2
        mode = self.rnd.choice(["constant", "edge"])
        shape = tuple(d + widths[i] + widths[4 + i] for i, d in enumerate(s))
        self.add("Pad", [x, self.constant(np.array(widths, np.int64))], shape, mode=mode)


def random_graph(rnd: Random) -> onnx.ModelProto:
    """A model of one to twelve nodes with one input, x; every value that nothing reads is an output."""
    b = Builder(rnd)
    n, c = rnd.choice([1, 1, 2]), rnd.choice([1, 2, 3, 4, 8])
    b.shapes["x"] = rnd.choice([(n, c, rnd.randint(1, 9), rnd.randint(1, 9)), (n, c), (n, c, rnd.randint(1, 9)), (c,)])
    start = b.shapes["x"]
    for _ in range(rnd.randint(1, 12)):
        b.step()
    if not b.nodes:
        b.unary("x", start)
    read = {i for node in b.nodes for i in node.input}
    outputs = [name for name in b.shapes if name != "x" and name not in read]
    graph = h.make_graph(
        b.nodes,
        "random",
        [h.make_tensor_value_info("x", TP.FLOAT, start)],
        [h.make_tensor_value_info(name, TP.FLOAT, b.shapes[name]) for name in outputs],
        [nh.from_array(v, k) for k, v in b.init.items()],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**40, 2**63 - 1)


def damage(model: onnx.ModelProto, rnd: Random) -> onnx.ModelProto:
    """A copy with one to four fields changed to something that its writer did not mean."""
    bad = onnx.ModelProto()
    bad.CopyFrom(model)
    for _ in range(rnd.randint(1, 4)):
        _spoil(bad, rnd)
    return bad


def _spoil(model: onnx.ModelProto, rnd: Random) -> None:
    graph = model.graph
    names = [v.name for v in (*graph.input, *graph.output, *graph.initializer)] + [
        o for n in graph.node for o in n.output
    ]
    kind = rnd.randrange(14)
    if kind in (11, 12, 13):
        kind = 0  # attributes are where most of the meaning is
    node = rnd.choice(graph.node) if graph.node else None
    if kind == 0 and node is not None and node.attribute:
        attr = rnd.choice(node.attribute)
        if attr.ints:
            attr.ints[rnd.randrange(len(attr.ints))] = rnd.choice(NUMBERS)
            if rnd.random() < 0.3:
                del attr.ints[rnd.randrange(len(attr.ints)) :]
        elif attr.type == onnx.AttributeProto.INT:
            attr.i = rnd.choice(NUMBERS)
        elif attr.type == onnx.AttributeProto.STRING:
            attr.s = rnd.choice([b"", b"NOTSET", b"SAME_UPPER", b"\xff", b"linear", b"x" * 50])
        elif attr.type == onnx.AttributeProto.FLOAT:
            attr.f = rnd.choice([0.0, -1.0, math.nan, math.inf, 1e38])
    elif kind == 1 and node is not None and node.input:
        node.input[rnd.randrange(len(node.input))] = rnd.choice([*names, "", "nothing"])
    elif kind == 2 and node is not None:
        node.op_type = rnd.choice([*UNARY, *BINARY, "Conv", "Reshape", "Loop", "If", "Slice", "Softmax", "Gather", ""])
    elif kind == 3 and node is not None and node.input:
        del node.input[rnd.randrange(len(node.input)) :]
    elif kind == 4 and graph.initializer:
        tensor = rnd.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rnd.randrange(len(tensor.dims))] = rnd.choice(NUMBERS)
    elif kind == 5 and graph.initializer:
        rnd.choice(graph.initializer).data_type = rnd.randrange(30)
    elif kind == 6 and graph.initializer:
        tensor = rnd.choice(graph.initializer)
        array = nh.to_array(tensor) if tensor.data_type in (TP.FLOAT, TP.INT64) and _whole(tensor) else None
        if array is not None and array.size:
            array = array.copy()
            array.reshape(-1)[rnd.randrange(array.size)] = rnd.choice(NUMBERS)
            tensor.CopyFrom(nh.from_array(array, tensor.name))
    elif kind == 7 and graph.input:
        dims = rnd.choice(graph.input).type.tensor_type.shape.dim
        if dims:
            dims[rnd.randrange(len(dims))].dim_value = rnd.choice([*NUMBERS[2:10], 64])
    elif kind == 8:
        model.opset_import[0].version = rnd.choice([0, 1, 6, 7, 9, 11, 13, 18, 21, 99])
    elif kind == 9 and graph.output:
        rnd.choice(graph.output).name = rnd.choice([*names, "", "nothing"])
    elif kind == 10 and node is not None:
        graph.node.append(node)


def _whole(tensor: onnx.TensorProto) -> bool:
    item = 4 if tensor.data_type == TP.FLOAT else 8
    return all(0 <= d < 2**20 for d in tensor.dims) and math.prod(tensor.dims) * item == len(tensor.raw_data)


def flip(data: bytes, rnd: Random) -> bytes:
    """``data`` with a few bytes changed, removed, doubled or cut off."""
    out = bytearray(data)
    for _ in range(rnd.randint(1, 6)):
        if not out:
            break
        at, kind = rnd.randrange(len(out)), rnd.randrange(5)
        if kind < 2:
            out[at] = rnd.randrange(256)
        elif kind == 2:
            del out[at : at + rnd.randint(1, 16)]
        elif kind == 3:
            out[at:at] = out[at : at + rnd.randint(1, 16)]
        elif rnd.random() < 0.2:
            del out[at:]
    return bytes(out)
