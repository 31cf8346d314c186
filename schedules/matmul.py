"""Dense float32 matrix product of two activations: C[b] = scale * A[b] @ B[b], each where and as it lies.

Register blocking: ``rows`` x ``vectors`` accumulators, one buffer a row (TVM keeps only small buffers in registers), K
innermost and serial, no packing: a panel of B is read from L2 at 8 bytes a cycle, a quarter of what the core can take.
A comes as single floats, so that its rows and columns may have any stride; rows of B and C are contiguous. The last vector
of a row of C is masked, leftover rows are a second variant of the micro-kernel.
Measured on one Zen 4 thread: 256x256x256 at 106-113 of 118 GFLOP/s; on the planes of BERT, 12 times 128x64 * 64x128 and
64x128 * 128x128, at 95-112.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

from ..target import CpuTarget

MIN_PARALLEL = 1 << 17  # multiply-adds below which threads do not pay: about 3 us of one core
MAX_WIDTH = 15  # vectors of one accumulator buffer: TVM moves buffers of 1 KiB to the heap
TASKS = 16  # parallel iterations to aim for


@dataclass(frozen=True)
class MatmulShape:
    """``batch`` products [m, k] @ [k, n]; an operand without batch (``shared_*``) serves all of them."""

    batch: int
    m: int
    n: int
    k: int
    shared_a: bool = False
    shared_b: bool = False

    @staticmethod
    def of(a: Sequence[int], b: Sequence[int]) -> MatmulShape | None:
        """The workload of two operand shapes; None for vectors, empty operands and partly broadcast batches."""
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            return None
        batch_a, batch_b = math.prod(a[:-2]), math.prod(b[:-2])
        rank = max(len(a), len(b)) - 2
        full_a, full_b = [1] * (rank + 2 - len(a)) + list(a[:-2]), [1] * (rank + 2 - len(b)) + list(b[:-2])
        if full_a != full_b and batch_a != 1 and batch_b != 1:
            return None
        batch = max(batch_a, batch_b)
        shape = MatmulShape(batch, a[-2], b[-1], a[-1], batch_a < batch, batch_b < batch)
        if shape.shared_b and not shape.shared_a:  # the batches of A are just more rows
            shape = MatmulShape(1, batch * shape.m, shape.n, shape.k)
        return shape if min(shape.batch, shape.m, shape.n, shape.k) > 0 else None

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Matrices:
    """Where one operand of a batch of products lies in its buffer of ``size`` floats: element (i, j) of the matrix at the
    position (p, q, ..) of the batch is at ``first`` + p * ``batch``[0] + q * ``batch``[1] + .. + i * ``row`` + j *
    ``column``."""

    size: int
    row: int
    column: int = 1
    batch: tuple[int, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Product:
    """``extents`` of the batch; A [m, k], B [k, n] and C [m, n] of each position."""

    m: int
    n: int
    k: int
    a: Matrices
    b: Matrices
    c: Matrices
    extents: tuple[int, ...] = ()
    scale: float = 1.0

    @property
    def shape(self) -> MatmulShape:
        return MatmulShape(math.prod(self.extents), self.m, self.n, self.k)


def block_shape(shape: MatmulShape, target: CpuTarget) -> tuple[int, int]:
    """(rows, vectors) of the micro-kernel with the fewest estimated cycles."""
    accumulators = target.registers * 3 // 4
    vectors = -(-shape.n // target.lanes)

    def cycles(rows: int, width: int) -> int:
        def one(r: int, v: int) -> int:  # FMAs, latency of a single step, loads of B: from L1, or at L2 speed
            resident = shape.k * width * target.lanes * 8 <= target.l1_bytes
            return max(r * v, 8, r + 2 * v if resident else 5 * v)

        total = 0
        for r, times in ((rows, shape.m // rows), (shape.m % rows, 1)):
            for v, panels in ((width, vectors // width), (vectors % width, 1)):
                total += times * panels * one(r, v) if r and v else 0
        return total

    choices = [
        (rows, width)
        for rows in range(1, min(shape.m, 12) + 1)
        for width in range(1, min(vectors, accumulators // rows, MAX_WIDTH) + 1)
    ]
    return min(choices, key=lambda c: (cycles(*c), -c[0] * c[1], c[0] + c[1]))


Starts = tuple[Any, Any, Any]  # offsets into A, B and C


class _Micro:
    """Emits micro-kernels on flat views of the operands."""

    def __init__(self, product: Product, lanes: int, a: Any, b: Any, c: Any) -> None:
        self.product, self.lanes, self.a, self.b, self.c = product, lanes, a, b, c

    def emit(self, rows: int, vectors: int, starts: Starts, *, masked: bool) -> None:
        """C[rows, vectors * lanes] from as many rows of A and columns of B; the last vector may be masked."""
        a0, b0, c0 = starts
        p, lanes = self.product, self.lanes
        rest = p.n % lanes
        mask = tirx.get_active_lane_mask(f"uint1x{lanes}", tirx.const(0, "int32"), tirx.const(rest, "int32"))
        acc = [B.alloc_buffer((vectors * lanes,), "float32") for _ in range(rows)]
        for r in range(rows):
            for v in range(vectors):
                B.buffer_store(acc[r], B.Broadcast(B.float32(0), lanes), [B.Ramp(v * lanes, 1, lanes)])
        with B.serial(0, p.k) as step:
            columns = []
            for v in range(vectors):
                index = B.Ramp(b0 + step * p.b.row + v * lanes, 1, lanes)
                if masked and v == vectors - 1:
                    value = B.masked_load(f"float32x{lanes}", self.b, index, mask)
                else:
                    value = self.b[index]
                columns.append(B.bind(value))
            for r in range(rows):
                factor = B.bind(B.Broadcast(self.a[a0 + r * p.a.row + step * p.a.column], lanes))
                for v in range(vectors):
                    at = B.Ramp(v * lanes, 1, lanes)
                    B.buffer_store(acc[r], acc[r][at] + factor * columns[v], [at])
        for r in range(rows):
            for v in range(vectors):
                index = B.Ramp(c0 + r * p.c.row + v * lanes, 1, lanes)
                value = acc[r][B.Ramp(v * lanes, 1, lanes)]
                if p.scale != 1.0:
                    value = value * B.Broadcast(B.float32(p.scale), lanes)
                if masked and v == vectors - 1:
                    B.evaluate(B.masked_store(self.c, value, index, mask))
                else:
                    B.buffer_store(self.c, value, [index])


def matmul(
    a_shape: Sequence[int], b_shape: Sequence[int], c_shape: Sequence[int], shape: MatmulShape, target: CpuTarget
) -> tirx.PrimFunc:
    """PrimFunc(A f32[a_shape], B f32[b_shape], C f32[c_shape]), batches flattened as ``shape`` says."""
    m, n, k = shape.m, shape.n, shape.k
    product = Product(
        m,
        n,
        k,
        Matrices(math.prod(a_shape), k, batch=(0 if shape.shared_a else m * k,)),
        Matrices(math.prod(b_shape), n, batch=(0 if shape.shared_b else k * n,)),
        Matrices(math.prod(c_shape), n, batch=(m * n,)),
        (shape.batch,),
    )
    return emit_product(product, target, (a_shape, b_shape, c_shape))


def emit_product(product: Product, target: CpuTarget, shapes: Sequence[Sequence[int]] | None = None) -> tirx.PrimFunc:
    """PrimFunc(A, B, C): float32 buffers of ``shapes`` (default: flat)."""
    shape, lanes = product.shape, target.lanes
    rows, width = block_shape(shape, target)
    blocks, rest_rows = divmod(shape.m, rows)
    vectors = -(-shape.n // lanes)
    panels, rest_vectors = divmod(vectors, width)
    ragged = shape.n % lanes != 0
    if ragged and rest_vectors == 0:  # the masked panel is always the last one, and of a kind of its own
        panels, rest_vectors = panels - 1, width
    row_tasks = min(blocks, max(1, TASKS // shape.batch)) if blocks >= 4 or panels + bool(rest_vectors) < 4 else 1
    per_task = -(-blocks // row_tasks)
    row_tasks = -(-blocks // per_task)
    all_panels = panels + bool(rest_vectors)
    panel_tasks = all_panels if shape.batch * row_tasks < TASKS // 2 else 1

    with IRBuilder() as ib, B.prim_func(s_tir=True):
        B.func_name("matmul")
        B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        operands = product.a, product.b, product.c
        given = shapes or [(o.size,) for o in operands]
        args = []
        for name, dims in zip("ABC", given, strict=True):
            args.append(B.arg(name, B.Buffer(tuple(tirx.const(d, "int64") for d in dims), "float32")))
        flat = [B.decl_buffer((o.size,), "float32", data=arg.data) for arg, o in zip(args, operands, strict=True)]
        micro = _Micro(product, lanes, *flat)

        def rows_of(task: Any, starts: Starts, wide: int, masked: bool) -> None:
            a0, b0, c0 = starts

            def block(index: Any, count: int) -> None:
                at = (a0 + index * (rows * product.a.row), b0, c0 + index * (rows * product.c.row))
                micro.emit(count, wide, at, masked=masked)

            with B.serial(0, per_task) as i:
                index = B.bind(task * per_task + i)
                if per_task * row_tasks == blocks:
                    block(index, rows)
                else:
                    with B.If(index < blocks), B.Then():
                        block(index, rows)
            if rest_rows:
                with B.If(task == row_tasks - 1), B.Then():
                    block(blocks, rest_rows)

        def panel_of(panel: Any, task: Any, starts: Starts, last: bool) -> None:
            a0, b0, c0 = starts
            first = B.bind(panel * (width * lanes))
            rows_of(task, (a0, b0 + first, c0 + first), rest_vectors if last else width, last and ragged)

        def columns_of(task: Any, starts: Starts) -> None:
            if panels:
                with B.serial(0, panels) as panel:
                    panel_of(panel, task, starts, last=False)
            if rest_vectors:
                panel_of(B.int32(panels), task, starts, last=True)

        def one_panel(panel: Any, task: Any, starts: Starts) -> None:
            if panels and rest_vectors:
                with B.If(panel < panels):
                    with B.Then():
                        panel_of(panel, task, starts, last=False)
                    with B.Else():
                        panel_of(panel, task, starts, last=True)
            else:
                panel_of(panel, task, starts, last=not panels)

        def start(matrices: Matrices, position: Sequence[Any]) -> Any:
            at = matrices.first
            for stride, index in zip(matrices.batch, position, strict=True):
                at = at + stride * index
            return B.bind(at) if position else B.int32(at)

        total = shape.batch * row_tasks * panel_tasks
        loop = B.parallel if shape.macs >= MIN_PARALLEL and total > 1 else B.serial
        with loop(0, total) as job:
            rest = B.bind(job // (row_tasks * panel_tasks))
            panel = B.bind(job % (row_tasks * panel_tasks) // row_tasks)
            task = B.bind(job % row_tasks)
            position: list[Any] = []
            for extent in reversed(product.extents):
                position.insert(0, rest % extent if len(position) + 1 < len(product.extents) else rest)
                rest = rest // extent
            starts = start(product.a, position), start(product.b, position), start(product.c, position)
            if panel_tasks > 1:
                one_panel(panel, task, starts)
            else:
                columns_of(task, starts)
    return ib.get().without_attr("global_symbol")
