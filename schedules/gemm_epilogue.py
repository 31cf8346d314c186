"""How the gather GEMM's results leave the registers: epilogue, mask of the positions that are no pixel, store.

A short epilogue is emitted for every accumulator. A long one (erf, exp) would multiply into code that takes minutes to
compile: where there are more than a few accumulators they are stored as they are, and a loop applies it while they are in
L1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as B

from .emit import broadcast, lane_mask, loop, store, streams, transpose, vector, write, zeros
from .pointwise import BRIEF, Program

MOST_COPIES = 8  # of a long epilogue in the code of one tile


def in_a_loop(program: Program, results: int) -> bool:
    return results > MOST_COPIES and any(instr.op not in BRIEF for instr in program.instrs)


class Epilogue:
    """Stores of the kernels in ``gather_gemm.py`` and ``across.py``, which own the buffers."""

    gemm: Any
    lanes: int
    consts: dict[str, Any]
    bias: str | None
    epilogue: Program
    tensors: list[tuple[Any, Any]]
    mask: Any
    out: Any

    def _value(self, value: Any, row: Any, at: Callable[[int, Any], Any], mask: Any = None) -> Any:
        """The epilogue of a vector of output channel ``row``; ``at(j, slot)``: where the vector of residual ``j`` lies,
        channel included."""
        operands = {"t0": value}
        operands |= {name: broadcast(b[row], self.lanes) for name, b in self.consts.items() if name != self.bias}
        for j, (slot, buffer) in enumerate(self.tensors):
            operands[f"t{j + 1}"] = vector(buffer, at(j + 1, slot), self.lanes, mask)
        return self.epilogue.evaluate(operands, self.lanes)

    def _masked(self, value: Any, q: Any, v: Any) -> Any:
        """Zero where vector ``v`` of a tile is no pixel."""
        if self.mask is None:
            return value
        index = B.Ramp(q.at(-1) + v * self.lanes, 1, self.lanes)
        zero = broadcast(B.float32(0), self.lanes)
        return B.Select(self.mask[index] != B.Broadcast(B.int32(0), self.lanes), value, zero)

    def _finish(self, row: Any, q: Any, outs: Any, get: Any, rows: int, vectors: int, edges: Any, total: int) -> None:
        """``get(i, v)``: the accumulators, which go to ``outs[i][v]``; the zeros around the pixels come with the first and
        the last tile."""
        stored = self.gemm.stored

        def result(value: Any, i: Any, v: Any) -> Any:
            at = lambda j, slot: slot.base + (row + i) * slot.layout.c_pitch + q.at(j) + v * q.step(slot)
            return self._masked(self._value(value, row + i, at), q, v)

        if in_a_loop(self.epilogue, rows * vectors) and not streams(stored):
            for i in range(rows):
                for v in range(vectors):
                    store(self.out, get(i, v), outs[i][v], self.lanes)
            slot = self.gemm.dst
            with B.serial(0, rows) as i, B.serial(0, vectors) as v:
                to = B.bind(outs[0][0] + i * slot.layout.c_pitch + v * q.step(slot))
                store(self.out, result(vector(self.out, to, self.lanes), i, v), to, self.lanes)
        else:
            for i in range(rows):
                for v in range(vectors):
                    write(self.out, result(get(i, v), i, v), outs[i][v], stored, self.lanes)
        if self.mask is not None:
            self._zero_edges(row, rows, edges, total)

    def _zero_edges(self, row: Any, rows: int, edges: dict[str, Any], total: int) -> None:
        lay, dst = self.gemm.dst.layout, self.gemm.dst
        behind = self.gemm.vectors * self.lanes
        for where, tile, start, count in (
            ("first", 0, -lay.front, lay.front),
            ("last", total - 1, behind, lay.c_pitch - lay.front - behind),
        ):
            if edges[where] is None or not count:
                continue
            with B.If(edges[where] == tile), B.Then(), loop(rows) as i:
                zeros(self.out, dst.base + (row + i) * lay.c_pitch + start, count, self.lanes)

    def _store_square(self, row: Any, q: Any, columns: list[Any], width: int) -> None:
        """``columns``: of each pixel, ``width`` channels from ``row``."""
        lanes, pixels, dst = self.lanes, len(columns), self.gemm.dst
        mask = lane_mask(lanes, pixels) if pixels < lanes else None

        def to(i: Any) -> Any:
            return dst.base + (row + i) * dst.layout.c_pitch + q.at(-1)

        def result(value: Any, i: Any) -> Any:
            at = lambda j, slot: slot.base + (row + i) * slot.layout.c_pitch + q.at(j)
            return self._value(value, row + i, at, mask)

        late = in_a_loop(self.epilogue, width)
        for i, value in enumerate(transpose(columns, width, lanes)):
            store(self.out, value if late else result(value, i), to(i), lanes, mask)
        if late:
            with B.serial(0, width) as i:
                at = B.bind(to(i))
                store(self.out, result(vector(self.out, at, lanes, mask), i), at, lanes, mask)
