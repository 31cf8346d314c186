"""A small compiled module with hand-made manifest, for tests that need no SkimTVM compiler.

    data: f32[1,3,8,8], weights: 20 MB
    y    = relu(flatten(data) @ W)      f32[1,2500]
    same = data                         an input passed through
    who  = thread id of each iteration  i32[64], 64 iterations of a parallel loop

``python sample.py OUT.so`` writes it.
"""

import sys
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T

import skimtvm
from skimtvm import artifact
from skimtvm.report import LayerRecord, Manifest, TensorSpec

ROWS, COLUMNS = 192, 26000
WEIGHTS = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype("float32") * np.float32(0.1)


@dataclass(frozen=True)
class Compiled:
    manifest: Manifest
    executable: object


@T.prim_func(s_tir=True, private=True)
def _who(Y: T.Buffer((64,), "int32")):
    for i in T.parallel(64):
        Y[i] = T.call_extern("int32", "gettid")


def _relax_module():
    bb = relax.BlockBuilder()
    data = relax.Var("data", relax.TensorType((1, 3, 8, 8), "float32"))
    who = bb.add_func(_who, "who")
    with bb.function("main", [data]):
        with bb.dataflow():
            flat = bb.emit(relax.op.reshape(data, (1, ROWS)))
            y = bb.emit(relax.op.nn.relu(relax.op.matmul(flat, relax.const(WEIGHTS))))
            ids = bb.emit(relax.call_tir(who, [], out_ty=relax.TensorType((64,), "int32")))
            out = bb.emit_output(relax.Tuple([y, data, ids]))
        bb.emit_func_output(out)
    return bb.get()


MANIFEST = Manifest(
    skimtvm_version=skimtvm.__version__,
    tvm_version=tvm.__version__,
    target="x86-64-v3",
    features=("avx2", "fma"),
    inputs=(TensorSpec("data", (1, 3, 8, 8), "float32"),),
    outputs=(
        TensorSpec("y", (1, COLUMNS), "float32"),
        TensorSpec("same", (1, 3, 8, 8), "float32"),
        TensorSpec("who/ids:0", (64,), "int32"),
    ),
    layers=(
        LayerRecord("fc", "dense", "1x192 * 192x26000", "f32_dense", "test", ROWS * COLUMNS, 2496000, ROWS * COLUMNS),
        LayerRecord("who", "elementwise", "64"),
    ),
    calls=(0, 0, 1),
    model_sha256="0" * 64,
    model_name="sample",
)


def build(manifest: Manifest = MANIFEST) -> Compiled:
    """The compiled sample; the executable is made once."""
    global _executable  # noqa: PLW0603
    if _executable is None:
        target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
        _executable = tvm.compile(_relax_module(), target=target)
    return Compiled(manifest, _executable)


_executable = None


def expected(data: np.ndarray) -> np.ndarray:
    return np.maximum(data.reshape(1, ROWS).astype("float64") @ WEIGHTS, 0)


if __name__ == "__main__":
    artifact.write(build(), sys.argv[1])
