"""From simplified Relax to kernel calls: what fuses, where values are placed, how a batch is split, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from skimtvm import importer, pipeline
from skimtvm.chooser import choose
from skimtvm.compiler import CompileOptions, compile_model
from skimtvm.errors import InternalError, InvalidOption, OutputExists
from skimtvm.formats.stats import analyse
from skimtvm.relay_passes import simplify_passes
from skimtvm.relay_passes._utils import Graph
from skimtvm.relay_passes.fuse_layers import FuseLayers
from skimtvm.relay_passes.layers import read_layer
from skimtvm.relay_passes.nodes import classify
from skimtvm.relay_passes.plan_layouts import Plan
from skimtvm.relay_passes.split_batch import Cut, compare
from skimtvm.relay_passes.verify import verify_lowered
from skimtvm.report import LayerRecord
from skimtvm.workload import ConvWorkload, DenseWorkload

from ..networks.graphs import Net, check


def fused(net: Net, *outputs: str) -> tvm.IRModule:
    mod = importer.load_model(net.model(*outputs)).mod
    for p in [*simplify_passes(), FuseLayers()]:
        mod = p(mod)
    return mod


def layers(mod: tvm.IRModule) -> list[Any]:
    graph = Graph.of(mod)
    return [n.layer for n in classify(graph, 8) if n.layer is not None]


def test_bias_sum_and_relu_go_into_the_later_convolution() -> None:
    net = Net(1, 8, 10, 10)
    a, b = net.conv("x", 8, 8), net.conv("x", 8, 8, 1, pads=[0] * 4)
    found = layers(fused(net, net.op("Relu", net.op("Add", a, b))))
    assert [layer.kind for layer in found] == ["conv2d", "conv2d"]
    assert [str(layer.program) for layer in found] == ["add", "add+add+relu"]


def test_swish_diamond_is_one_layer() -> None:
    net = Net(1, 8, 10, 10)
    y = net.conv("x", 8, 8)
    found = layers(fused(net, net.op("Mul", y, net.op("Sigmoid", y))))
    assert len(found) == 1 and str(found[0].program) == "add+sigmoid+multiply"


def test_value_with_another_reader_is_not_swallowed() -> None:
    net = Net(1, 8, 10, 10)
    y = net.conv("x", 8, 8)
    found = layers(fused(net, y, net.op("Relu", y)))
    assert [str(layer.program) for layer in found] == ["add", "relu"]


def test_gate_enters_the_epilogue_at_batch_one_only() -> None:
    for batch, kinds in ((1, ["conv2d"]), (2, ["conv2d", "pointwise"])):
        net = Net(batch, 8, 10, 10)
        net.inputs.append(__import__("onnx").helper.make_tensor_value_info("g", 1, [batch, 8, 1, 1]))
        found = layers(fused(net, net.op("Mul", net.conv("x", 8, 8), "g")))
        assert [layer.kind for layer in found] == kinds


def plan_of(mod: tvm.IRModule) -> tuple[Plan, list[Any]]:
    graph = Graph.of(mod)
    nodes = classify(graph, 8)
    return Plan(nodes, list(graph.func.params)), nodes


def test_padding_only_where_a_consumer_reads_it() -> None:
    net = Net(1, 8, 10, 10)
    a = net.op("Relu", net.conv("x", 8, 8, 1, pads=[0] * 4))
    b = net.op("Relu", net.conv(a, 8, 8, 3))
    c = net.conv(b, 8, 8, 1, pads=[0] * 4)
    plan, nodes = plan_of(fused(net, c))
    halos = [plan.places[n.var].layout.zero_halo for n in nodes]
    assert halos == [True, False, False]
    assert {plan.places[n.var].layout.row_pitch for n in nodes} == {11}, "one space: rows share one gap"


def test_concat_parts_are_written_in_place() -> None:
    net = Net(1, 8, 10, 10)
    a, b = net.conv("x", 8, 4), net.conv("x", 8, 6, 1, pads=[0] * 4)
    c = net.conv(net.op("Concat", a, b, axis=1), 10, 4)
    mod = fused(net, c)
    plan, nodes = plan_of(mod)
    concat = next(n for n in nodes if n.kind == "concat")
    places = [plan.places[v] for v in concat.inputs]
    assert [p.channel for p in places] == [0, 4] and all(p.root == concat.var for p in places)
    compiled = check(net.model(c))
    assert not any(r.op == "concat_copy" for r in compiled.manifest.layers)


def test_channel_selection_costs_no_copy() -> None:
    net = Net(1, 8, 10, 10)
    y = net.conv("x", 8, 12)
    a, b = net.op("Split", y, net.const(np.array([5, 7], np.int64)), outputs=2, axis=1)
    compiled = check(net.model(net.conv(a, 5, 4, density=0.5), net.conv(b, 7, 4)))
    kinds = [r.op for r in compiled.manifest.layers if r.op != "layout"]
    assert kinds == ["conv2d", "conv2d", "conv2d"]


def test_split_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cut, the numbers stay; kernels before it are called once an image."""
    net = Net(3, 4, 12, 12)
    y = net.op("Relu", net.conv("x", 4, 8, density=0.3))
    y = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Relu", net.conv(y, 8, 12))
    y = net.op("Flatten", net.op("GlobalAveragePool", y))
    y = net.op("Gemm", y, net.const(net.rng.standard_normal((12, 5)).astype(np.float32)))
    model = net.model(y)
    for index in (1, 2, 3, 5):
        monkeypatch.setattr(pipeline, "find_cut", lambda *a, i=index: Cut(i, 1, "test"))
        compiled = check(model)
        first = compiled.manifest.calls.count(
            next(i for i, r in enumerate(compiled.manifest.layers) if r.op == "conv2d")
        )
        assert first == 3
        assert any(r.op == "batch" for r in compiled.manifest.layers)


def test_network_that_mixes_images_is_not_split() -> None:
    graphs = []
    for batch in (1, 4):
        net = Net(batch, 4, 6, 6)
        mod = fused(net, net.op("Softmax", net.conv("x", 4, 4), axis=0))
        graphs.append(Graph.of(mod))
    assert "across images" in compare(graphs[0], graphs[1], 4)


def test_verify_refuses_what_was_not_lowered() -> None:
    net = Net(1, 4, 6, 6)
    mod = importer.load_model(net.model(net.conv("x", 4, 4))).mod
    with pytest.raises(InternalError, match="was not lowered"):
        verify_lowered(mod, [])
    lowered = pipeline.run(mod, __import__("skimtvm.target", fromlist=["x"]).resolve())
    with pytest.raises(InternalError, match="disappeared"):
        verify_lowered(lowered.mod, [("nothing", LayerRecord("a", "b", "c"))])


CONV, FC = ConvWorkload(1, 64, 14, 14, 64, 3, 3, padding=(1, 1, 1, 1)), DenseWorkload(1, 4096, 1000)


def stats_at(density: float, rows: int = 1, shape: tuple[int, ...] = (64, 64, 3, 3)) -> Any:
    rng = np.random.default_rng(0)
    mask = np.repeat(rng.random((shape[0] // rows, *shape[1:])) < density, rows, axis=0)
    return analyse((mask * np.ones(shape)).astype(np.float32))


@pytest.mark.parametrize(
    "workload,density,rows,kernel",
    [(CONV, 1.0, 1, "dense"), (CONV, 0.8, 1, "dense"), (CONV, 0.1, 1, "csr"), (CONV, 0.1, 4, "bsr4"), (CONV, 0.1, 8, "bsr8"),
     (CONV, 0.0, 1, "csr"), (FC, 0.7, 1, "dense"), (FC, 0.1, 1, "sell"), (FC, 0.1, 4, "sell")],
)  # fmt: skip
def test_choice_and_reason(workload: Any, density: float, rows: int, kernel: str) -> None:
    choice = choose("a", workload, stats_at(density, rows))
    assert choice.kernel == kernel
    assert choice.reason


def test_threshold_and_force_override_the_model() -> None:
    half = stats_at(0.3)
    assert choose("a", CONV, half, threshold=0.2).kernel == "dense"
    assert choose("a", CONV, stats_at(0.9), threshold=0.95).kernel != "dense"
    assert choose("a", CONV, half, force={"a": "dense"}).kernel == "dense"
    with pytest.raises(InvalidOption, match="can take dense, sell"):
        choose("a", FC, half, force={"a": "bsr4"})
    net = Net(1, 4, 6, 6)
    with pytest.raises(InvalidOption, match="no such layer"):
        compile_model(net.model(net.conv("x", 4, 4)), CompileOptions(force=(("nope", "csr"),)))


def test_layer_reader_keeps_operands_apart() -> None:
    net = Net(1, 8, 10, 10)
    y = net.op("Add", net.conv("x", 8, 8), "x")  # the residual is the input of the convolution
    mod = fused(net, y)
    layer = read_layer(next(f for gv, f in mod.functions.items() if gv.name_hint.startswith("conv2d")))
    assert layer.inputs == (0, 0) and str(layer.program) == "add+add"
    check(net.model(y))


def test_dump_keeps_to_its_own_files(tmp_path: Any) -> None:
    net = Net(1, 4, 6, 6)
    model = net.model(net.conv("x", 4, 4, density=0.3))
    for _ in range(2):  # a second dump replaces the first
        compile_model(model, CompileOptions(dump_ir=tmp_path / "ir", calibration="none"))
    names = sorted(f.name for f in (tmp_path / "ir").iterdir())
    assert [n for n in names if n.endswith(".py")] == [
        "00_import.py", "01_simplify.py", "02_fuse_layers.py", "03_lower_layers.py", "04_legalize_rest.py",
    ]  # fmt: skip
    assert "f32_csr_conv2d" in (tmp_path / "ir" / "03_lower_layers.py").read_text()
    (tmp_path / "ir" / "notes.md").write_text("mine")
    with pytest.raises(OutputExists, match="holds other files"):
        compile_model(model, CompileOptions(dump_ir=tmp_path / "ir", calibration="none"))
    assert (tmp_path / "ir" / "notes.md").read_text() == "mine"
