"""Small ONNX networks, the passes on them, operator counts, and the comparison with onnxruntime."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from skimtvm import importer
from skimtvm.relay_passes.simplify import Simplify, simplify_passes


def node(op, inputs, outputs, **attrs):
    """A node named after its first output."""
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attrs)


def model(nodes, shape, init=None, *, opset=17, outputs=("y",), inputs=None):
    """A checked ONNX model with input ``x`` of ``shape`` (and the further ``inputs``)."""
    info = helper.make_tensor_value_info
    ins = {"x": shape, **(inputs or {})}
    graph = helper.make_graph(
        nodes,
        "g",
        [info(k, TensorProto.FLOAT, s) for k, s in ins.items()],
        [info(k, TensorProto.FLOAT, None) for k in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (init or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    proto = onnx.shape_inference.infer_shapes(proto)  # fills in the shapes of the outputs
    onnx.checker.check_model(proto)
    return proto


def load(proto):
    return importer.load_model(proto).mod


def apply(mod, *passes):
    """The module after ``passes`` (default: the whole phase) and the list of the pass objects."""
    run = list(passes) or simplify_passes()
    for p in run:
        mod = p(mod)
    relax.analysis.well_formed(mod)  # raises
    return mod, run


def ops(mod):
    """Operator names of main (``fn`` for calls of functions) with their counts."""
    counts = Counter()
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call):
                counts[call.op.name.removeprefix("relax.") if isinstance(call.op, tvm.ir.Op) else "fn"] += 1
    return dict(counts)


def calls(mod, name):
    """The calls of operator ``name`` in main."""
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [v for v in values if isinstance(v, relax.Call) and getattr(v.op, "name", "") == "relax." + name]


def evaluate(mod, *arrays):
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    result = vm["main"](*[tvm.runtime.tensor(a) for a in arrays])
    return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]


def agrees(proto, mod, tolerance=1e-4):
    """The module computes what onnxruntime computes for the ONNX model, to ``tolerance`` of the largest output."""
    rng = np.random.default_rng(7)
    session = ort.InferenceSession(proto.SerializeToString())
    feeds = {i.name: rng.standard_normal(i.shape).astype("float32") for i in session.get_inputs()}
    for want, got in zip(session.run(None, feeds), evaluate(mod, *feeds.values()), strict=True):
        assert got.shape == want.shape
        assert np.isfinite(want).all() and np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))


def check(proto, *passes):
    """Load, simplify, compare, and see that a second run finds nothing: (module, counts of operators, passes)."""
    mod, run = apply(load(proto), *passes)
    agrees(proto, mod)
    again = Simplify() if not passes else type(passes[0])()
    again(mod)
    assert again.rewrites == 0, getattr(again, "counts", None)
    return mod, ops(mod), run


@pytest.fixture
def net():
    return SimpleNamespace(
        node=node,
        model=model,
        load=load,
        apply=apply,
        ops=ops,
        calls=calls,
        evaluate=evaluate,
        agrees=agrees,
        check=check,
    )


@pytest.fixture
def rand():
    """float32 normal arrays from a fixed seed."""
    rng = np.random.default_rng(3)
    return lambda *shape: rng.standard_normal(shape).astype("float32")
