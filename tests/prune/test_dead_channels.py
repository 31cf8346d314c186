"""Dead channels go through the whole graph without changing a number; what stays is explained."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from skimtvm.prune import dead_channels, oneshot, weights

from .chains import chain, make, only_dead, run

RNG = np.random.default_rng(11)

BN = ("BatchNormalization", ["s", "o", "m", "v"], {})


def with_bn(tensors, c=8):
    rng = np.random.default_rng(3)
    return tensors | {
        "s": rng.random(c) + 0.5,
        "o": rng.standard_normal(c),
        "m": rng.standard_normal(c),
        "v": rng.random(c) + 0.5,
    }


@pytest.mark.parametrize(
    "middle",
    [(), (("Relu", [], {}),), (BN, ("Relu", [], {})), (("Sigmoid", [], {}),),
     (("MaxPool", [], {"kernel_shape": [3, 3], "pads": [1] * 4}), ("LeakyRelu", [], {"alpha": 0.1})),
     (("Mul", ["k"], {}), ("Add", ["k"], {}))],
    ids=["direct", "relu", "bn-relu", "sigmoid", "pool-leaky", "shared-constant"],
)  # fmt: skip
def test_channels_that_nothing_reads_go(middle):
    nodes, t = chain(middle)
    t = with_bn(t) | {"k": RNG.standard_normal((8, 1, 1))}
    t["w2"][:, [1, 5]] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"conv1": 2}
    assert {n: w.shape for n, w in weights.read(after).items()} == {
        "conv1": (6, 3, 3, 3),
        "conv2": (6, 6, 3, 3),
        "conv3": (4, 6, 1, 1),
    }


def test_empty_filters_whose_value_ends_at_zero_go():
    nodes, t = chain([("Relu", [], {})])
    t["w1"][[0, 3]] = 0
    t["b1"][0], t["b1"][3] = -1.0, 2.0  # the first is 0 behind the ReLU, the other is not
    _, removed = only_dead(nodes, t)
    assert removed == {"conv1": 1}


def test_a_constant_moves_into_the_bias_where_nothing_is_padded():
    for pads, count in (((0, 0, 0, 0), 1), ((1, 1, 1, 1), 0)):
        nodes, t = chain([BN, ("Relu", [], {})], pads=pads)
        t = with_bn(t)
        t["o"][4] = 3.0
        t["w1"][4] = 0
        t["b1"][4] = t["m"][4]
        assert only_dead(nodes, t)[1] == ({"conv1": count} if count else {})


def test_removal_goes_on_backwards():
    """Without conv2's output nothing of conv1 is left but one channel."""
    nodes, t = chain([("Relu", [], {})])
    t["w3"][:, 1:] = 0
    t["w2"][0, 2:] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"conv2": 5, "conv1": 6} and weights.read(after)["conv1"].shape[0] == 2


def test_all_dead_leaves_one_channel():
    nodes, t = chain()
    t["w2"][:] = 0
    _, removed = only_dead(nodes, t)
    assert removed["conv1"] == 7


def test_flatten_to_a_dense_layer():
    nodes = [("Conv", ["x", "w1"], ["a"], {"name": "conv1"}), ("Relu", ["a"], ["b"], {}), ("Flatten", ["b"], ["c"], {}),
             ("Gemm", ["c", "w2", "b2"], ["y"], {"name": "fc", "transB": 1})]  # fmt: skip
    w2 = RNG.standard_normal((5, 8, 4))
    w2[:, [2, 7]] = 0
    t = {"w1": RNG.standard_normal((8, 3, 3, 3)), "w2": w2.reshape(5, 32), "b2": RNG.standard_normal(5)}
    used = make(nodes, t, ("N", 3, 4, 4))
    after, report = oneshot.prune_model(used, sparsity=0.0)
    removed = report.channels
    assert np.allclose(run(used), run(after), rtol=1e-5, atol=1e-5)
    assert removed == {"conv1": 2} and weights.read(after)["fc"].shape == (5, 24)


def test_two_consumers_must_agree():
    nodes, t = chain()
    nodes = [
        nodes[0],
        ("Conv", ["v0", "w2", "b2"], ["a"], {}),
        ("Conv", ["v0", "w5"], ["b"], {}),
        ("Add", ["a", "b"], ["y"], {}),
    ]
    t = {"w1": t["w1"], "b1": t["b1"], "w2": t["w2"], "b2": t["b2"], "w5": RNG.standard_normal((6, 8, 3, 3))}
    t["w2"][:, [0, 1]] = 0
    t["w5"][:, [1, 2]] = 0
    assert only_dead(nodes, t)[1] == {"conv1": 1}


# ---- through the graph -------------------------------------------------------------------------------------------------


def residual(zero_a, zero_b, unread=(), relu=True):
    """x -> a, x -> b, relu(a + b) -> conv; filters that are zero on either side, and columns of the reader."""
    t = {"wa": RNG.standard_normal((8, 3, 3, 3)), "wb": RNG.standard_normal((8, 3, 1, 1)),
         "w2": RNG.standard_normal((6, 8, 3, 3)), "b2": RNG.standard_normal(6)}  # fmt: skip
    t["wa"][list(zero_a)], t["wb"][list(zero_b)], t["w2"][:, list(unread)] = 0, 0, 0
    nodes = [("Conv", ["x", "wa"], ["a"], {"name": "a", "pads": [1] * 4}), ("Conv", ["x", "wb"], ["b"], {"name": "b"}),
             ("Add", ["a", "b"], ["s"], {}), ("Relu", ["s"], ["r"], {}),
             ("Conv", ["r", "w2", "b2"], ["y"], {"name": "conv2", "pads": [1] * 4})]  # fmt: skip
    return nodes, t


def test_residual_sum_needs_both_sides():
    after, removed = only_dead(*residual([0, 1, 2], [2, 3]))
    assert removed == {"a": 1, "b": 1}
    _, report = oneshot.prune_model(make(*residual([0, 1, 2], [2, 3])), sparsity=0.0)
    assert report.stayed["a"] == "2 idle channels stay: joined with channels of 'b' that live"
    assert report.stayed["b"] == "1 idle channel stays: joined with channels of 'a' that live"
    after, removed = only_dead(*residual([], [], unread=[4, 6]))
    assert removed == {"a": 2, "b": 2} and weights.read(after)["conv2"].shape == (6, 6, 3, 3)


def test_a_chain_of_residual_sums_is_one_group():
    """Identity shortcuts: the same channels of the first layer and of both blocks, or none."""
    t = {f"w{i}": RNG.standard_normal((8, 8, 3, 3)) for i in (1, 2)} | {"w0": RNG.standard_normal((8, 3, 3, 3)),
                                                                        "wy": RNG.standard_normal((4, 8, 1, 1))}  # fmt: skip
    for name in t:
        if name != "wy":
            t[name][[1, 5]] = 0
    t["w2"][7] = 0
    nodes = [("Conv", ["x", "w0"], ["v0"], {"name": "w0", "pads": [1] * 4})]
    for i in (1, 2):
        nodes.append(("Conv", [f"v{i - 1}", f"w{i}"], [f"c{i}"], {"name": f"w{i}", "pads": [1] * 4}))
        nodes += [("Add", [f"v{i - 1}", f"c{i}"], [f"s{i}"], {}), ("Relu", [f"s{i}"], [f"v{i}"], {})]
    nodes.append(("Conv", ["v2", "wy"], ["y"], {}))
    after, removed = only_dead(nodes, t)
    assert removed == {"w0": 2, "w1": 2, "w2": 2} and weights.read(after)["w1"].shape == (6, 6, 3, 3)


def test_concatenation_cuts_its_own_slice():
    nodes, t = residual([0, 1], [7])
    nodes[2] = ("Concat", ["a", "b"], ["s"], {"axis": 1})
    t["w2"] = RNG.standard_normal((6, 16, 3, 3))
    t["w2"][:, [3, 12]] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"a": 3, "b": 2} and weights.read(after)["conv2"].shape == (6, 11, 3, 3)


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_depthwise_goes_with_its_input(bias):
    t = {"w1": RNG.standard_normal((8, 3, 1, 1)), "wd": RNG.standard_normal((8, 1, 3, 3)), "bd": np.full(8, bias),
         "w2": RNG.standard_normal((6, 8, 1, 1))}  # fmt: skip
    t["w1"][2], t["wd"][3], t["w2"][:, 4] = 0, 0, 0
    nodes = [("Conv", ["x", "w1"], ["a"], {"name": "w1"}),
             ("Conv", ["a", "wd", "bd"], ["d"], {"name": "wd", "group": 8, "pads": [1] * 4}), ("Relu", ["d"], ["r"], {}),
             ("Conv", ["r", "w2"], ["y"], {"name": "w2"})]  # fmt: skip
    after, removed = only_dead(nodes, t)
    assert removed == {"w1": 3, "wd": 3} and weights.read(after)["wd"].shape == (5, 1, 3, 3)


def test_groups_go_as_a_whole():
    t = {"w1": RNG.standard_normal((8, 3, 1, 1)), "wg": RNG.standard_normal((12, 2, 3, 3)),
         "w2": RNG.standard_normal((6, 12, 1, 1))}  # fmt: skip
    t["w2"][:, [0, 1, 2, 5]] = 0  # all of the first group of three, one of the second
    nodes = [("Conv", ["x", "w1"], ["a"], {"name": "w1"}), ("Conv", ["a", "wg"], ["g"], {"name": "wg", "group": 4}),
             ("Conv", ["g", "w2"], ["y"], {"name": "w2"})]  # fmt: skip
    after, removed = only_dead(nodes, t)
    assert removed == {"w1": 2, "wg": 3}
    assert {n: w.shape for n, w in weights.read(after).items()} == {
        "w1": (6, 3, 1, 1), "wg": (9, 2, 3, 3), "w2": (6, 9, 1, 1)}  # fmt: skip


def test_a_split_gets_new_sizes():
    nodes, t = residual([0], [1])
    nodes = [nodes[0], ("Split", ["a"], ["l", "r"], {"axis": 1}), ("Conv", ["l", "wl"], ["m"], {}),
             ("Concat", ["m", "r"], ["s"], {"axis": 1}), ("Conv", ["s", "w2"], ["y"], {})]  # fmt: skip
    t |= {"wl": RNG.standard_normal((4, 4, 1, 1))}
    t["wl"][:, 1:3] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"a": 3}  # one filter of zeros, two channels that wl does not read
    split = next(n for n in after.graph.node if n.op_type == "Split")
    sizes = {i.name: numpy_helper.to_array(i).tolist() for i in after.graph.initializer}[split.input[1]]
    assert sizes == [1, 4]


def test_a_shared_parameter_is_copied_and_a_bias_made():
    """Exporters store equal vectors once; a constant channel needs a bias where there was none."""
    nodes, t = chain([BN, ("Relu", [], {})], pads=(0, 0, 0, 0))
    t = with_bn(t)
    t["w1"][4], t["b1"][4], t["m"][4], t["o"][4] = 0, 0.5, 0.5, 3.0
    nodes[3] = ("Conv", [nodes[3][1][0], "w2"], ["c2"], {"name": "conv2"})
    nodes.insert(0, ("Conv", ["x", "wz"], ["z"], {"name": "z", "pads": [1] * 4}))
    nodes.insert(1, ("BatchNormalization", ["z", "s", "o", "m", "v"], ["zn"], {}))
    nodes += [("Conv", ["zn", "w4"], ["z4"], {"pads": [0, 0, 0, 0]}), ("Sum", ["y", "z4"], ["out"], {})]
    t |= {"wz": RNG.standard_normal((8, 3, 3, 3)), "w4": RNG.standard_normal((4, 8, 3, 3))}
    after, removed = only_dead(nodes, t)
    assert removed == {"conv1": 1}
    assert {tuple(i.dims) for i in after.graph.initializer if i.name.startswith("m")} == {(8,), (7,)}


def test_a_factor_through_unsqueeze_is_cut_too():
    nodes, t = chain([("Mul", ["ku"], {}), ("Add", ["ku"], {})])
    nodes.insert(0, ("Unsqueeze", ["k", "axes"], ["ku"], {}))
    t |= {"k": RNG.standard_normal(8), "axes": np.array([1, 2])}
    t["w2"][:, [1, 5]] = 0
    after, removed = only_dead(nodes, t)
    assert removed == {"conv1": 2} and not any(n.op_type == "Unsqueeze" for n in after.graph.node)


@pytest.mark.parametrize(
    ("node", "words"),
    [(("LRN", ["v0"], ["v1"], {"size": 3}), "LRN 'v1' mixes channels"),
     (("Reshape", ["v0", "shape"], ["v1"], {}), "Reshape 'v1' mixes channels"),
     (("Add", ["v0", "x8"], ["v1"], {}), "Add 'v1' mixes channels")],
    ids=["lrn", "reshape", "input"],
)  # fmt: skip
def test_a_refusal_is_explained(node, words):
    nodes, t = chain()
    t["w1"][3], t["b1"][3] = 0, 0
    t["shape"] = np.array([0, 2, 4, 12, 12])
    back = ("Reshape", ["v1", "back"], ["v2"], {}) if node[0] == "Reshape" else ("Identity", ["v1"], ["v2"], {})
    t["back"] = np.array([0, 8, 12, 12])
    tile = ("Tile", ["x", "reps"], ["x8"], {})
    t["reps"] = np.array([1, 3, 1, 1])
    t["w2"] = t["w2"] if node[0] != "Add" else RNG.standard_normal((6, 9, 3, 3))
    if node[0] == "Add":
        t["w1"], t["b1"] = np.concatenate([t["w1"], t["w1"][:1]]), np.concatenate([t["b1"], t["b1"][:1]])
    nodes = [tile, nodes[0], node, back, ("Conv", ["v2", "w2", "b2"], ["y"], {"name": "conv2", "pads": [1] * 4})]
    if node[0] != "Add":
        nodes = nodes[1:]
    used = {i for n in nodes for i in n[1]}
    after, report = oneshot.prune_model(make(nodes, {k: v for k, v in t.items() if k in used}), sparsity=0.0)
    assert report.channels == {} and words in report.stayed["conv1"]
    assert (run(make(nodes, {k: v for k, v in t.items() if k in used})) == run(after)).all()


class Random:
    """A random graph over 4-D values with the same extent, whose filters and columns are often zero."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.tensors, self.values = [], {}, [("x", 3)]

    def tensor(self, array):
        name = f"t{len(self.tensors)}"
        self.tensors[name] = array
        return name

    def emit(self, op, inputs, channels, outputs=1, **attributes):
        names = [f"{op}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append((op, inputs, names, {"name": names[0], **attributes}))
        self.values += [(n, channels) for n in names]
        return names

    def conv(self, value, c, k, size, group=1):
        w = self.rng.standard_normal((k, c // group, size, size))
        w[self.rng.random(k) < 0.3] = 0
        w[:, self.rng.random(c // group) < 0.2] = 0
        inputs = [value, self.tensor(w)]
        if self.rng.random() < 0.7:
            inputs.append(self.tensor(self.rng.standard_normal(k) * (self.rng.random(k) < 0.6)))
        return self.emit("Conv", inputs, k, pads=[size // 2] * 4, group=group)

    def step(self):
        rng = self.rng
        value, c = self.values[rng.integers(len(self.values))]
        kind = rng.integers(12)
        if kind <= 2:
            self.conv(value, c, int(rng.choice([6, 8, 12])), int(rng.choice([1, 3])))
        elif kind == 3:
            self.conv(value, c, c * int(rng.choice([1, 2])), 3, group=c)
        elif kind == 4 and c % 2 == 0:
            self.conv(value, c, 8, 3, group=2)
        elif kind in (5, 6):
            other = next((v for v, k in rng.permutation(np.array(self.values, object)) if k == c and v != value), None)
            if other is not None:
                self.emit(str(rng.choice(["Add", "Mul", "Max", "Sub"])), [value, other], c)
        elif kind == 7:
            other, k = self.values[rng.integers(len(self.values))]
            self.emit("Concat", [value, other], c + k, axis=1)
        elif kind == 8:
            self.emit("BatchNormalization", [value, *(self.tensor(rng.random(c) + 0.5) for _ in range(4))], c)
        elif kind == 9 and c >= 4:
            first = int(rng.integers(1, c))
            names = self.emit("Split", [value, self.tensor(np.array([first, c - first]))], first, outputs=2, axis=1)
            self.values[-1] = (names[1], c - first)
        elif kind == 10:
            gate = self.emit("GlobalAveragePool", [value], c)[0]
            self.values.pop()
            self.emit("Mul", [self.emit("Sigmoid", [gate], c)[0], value], c)
            self.values.pop(-2)
        else:
            op, extra, more = [("Relu", [], {}), ("LeakyRelu", [], {"alpha": 0.2}), ("Tanh", [], {}),
                ("MaxPool", [], {"kernel_shape": [3, 3], "pads": [1] * 4}),
                ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
                ("PRelu", [self.tensor(rng.random((c, 1, 1)))], {}), ("Mul", [self.tensor(rng.random((1, c, 1, 1)))], {}),
                ("Add", [self.tensor(np.array(0.5))], {}), ("Transpose", [], {"perm": [0, 1, 3, 2]}),
                ("Pad", [self.tensor(np.array([0, 0, 0, 1, 0, 0, 0, -1]))], {})][rng.integers(10)]  # fmt: skip
            self.emit(op, [value, *extra], c, **more)

    def model(self):
        for _ in range(14):
            self.step()
        read = {i for n in self.nodes for i in n[1]}
        tops = [(v, c) for v, c in self.values if v not in read]
        self.emit("Concat", [v for v, _ in tops], c := sum(k for _, k in tops), axis=1)
        self.emit("Resize", [self.values[-1][0], "", self.tensor(np.array([1.0, 1, 2, 2]))], c)
        self.conv(self.values[-1][0], c, 5, 3)
        self.emit("Flatten", [self.emit("GlobalMaxPool", [self.values[-1][0]], 5)[0]], 5)
        self.emit("Gemm", [self.values[-1][0], self.tensor(self.rng.standard_normal((4, 5)))], 4, transB=1)
        return make(self.nodes, self.tensors, ("N", 3, 6, 6))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_graphs_keep_their_numbers(first):
    total = 0
    for seed in range(first, first + 20):
        model = Random(seed).model()
        after = onnx.ModelProto()
        after.CopyFrom(model)
        removal = dead_channels.remove(after)
        onnx.checker.check_model(after)
        want, got = run(model), run(after)
        assert np.abs(want - got).max() <= 2e-5 * max(1, np.abs(want).max()), seed
        total += sum(removal.channels.values())
        again = dead_channels.remove(after)
        assert again.channels == {} and again.stayed == removal.stayed, seed
    assert total > 100
