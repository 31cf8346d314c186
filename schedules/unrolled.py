"""The gather GEMM of unstructured sparsity as straight code: a load of the source serves up to 30 output channels.

    for tile, chunk in parallel:              # tiles of V vectors; chunks of row groups, cut by nonzeros
        for block in channel blocks:          # one, unless the source of a tile is too large for L2
            for g in row groups of the chunk:
                for v in vectors of the tile:
                    code[block, g](src + q + v, data, out)

A CSR row loads a vector of the source for every multiply-add, which bounds it to half of the peak. Here the sums of up to 30
output channels are in registers and the code of their group (``formats/unrolled.py``) names them, so that one load serves
every channel that needs it; weights are broadcast operands. The code is as long as the layer has nonzeros. It stays in L1
(or L2) while the vectors of a tile pass, as the source does while the groups pass. Between blocks sums wait in ``out``.

What is repeated for each nonzero comes as bytes; what surrounds it, here, as assembler text that LLVM reads with the kernel:
start values, residual, clipping, the mask of positions that are no pixel, and the store. Longer epilogues run in a loop on
what was stored, a few vectors at a time, while it is in L1; layers of few nonzeros a sum keep the loop over offsets then,
which has its sums in registers.

Only for AVX-512, whose multiply-adds take a broadcast operand from memory.

Measured on Zen 4, one thread, 90% zeros, share of the practical peak of 118 GFLOP/s on the multiply-adds done (CSR: 0.38 to
0.52): alone 3x3 and 5x5 0.60 to 0.79, 1x1 0.61 to 0.85, with 50% zeros 0.68 to 0.95; in ResNet-50 0.41 to 0.70 at batch 1,
where code and weights come from L3 and memory, 0.32 to 0.87 interleaved. Below half are 1x1 layers at 56x56: with 64 inputs
at batch 1 sums are started, summed with residuals and stored after 6 multiply-adds each, at batch 16 source and output come
from memory. An unaligned load fills both load ports for two cycles and a broadcast one port for one, which bounds 3x3 planes
at 90% to about 0.8 of the peak; everything else is bound by the multiply-adds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as B

from ..formats.unrolled import WINDOW, RowCode
from ..layout import LINE
from .emit import fetch, loop, store, streams, vector
from .gather_gemm import Body, Gemm, Tile, span
from .pointwise import Program, split_bias

AT_ONCE = 8  # vectors that wait in L1, of up to 30 rows each, for an epilogue that runs on what was stored
RUNS = 16  # vectors of a tile with which a group fetches the next one's code


@dataclass(frozen=True)
class Code:
    """Assembled row groups of a layer, one after the other for each of ``blocks`` of columns. ``name``: of the function

        void name(const float *src, const float *data, float *out, const float *bias, const float *residual, int64 g)

    that computes one vector of the rows of a group, or adds a block of columns to it; it holds a hash of ``text``, LLVM IR
    that defines it; ``fused``: the epilogue is in it. Bits of ``g``: 0
    to 31 the group, 32 to 47 the lanes that count, from 48 on which share of the next group's code to fetch."""

    name: str
    groups: int
    blocks: int
    fused: bool
    text: str = field(compare=False, repr=False)


def fused(program: Program) -> tuple[tuple[str, float, float], ...] | None:
    """``program`` without its bias as steps of the code: ("residual", 0, 0), ("max", 0, 0), ("clip", low, high). None where
    it does more."""
    _, rest = split_bias(program)
    steps: list[tuple[str, float, float]] = []
    value = "t0"
    for i, instr in enumerate(rest.instrs):
        others = list(instr.args)
        if others.count(value) != 1:
            return None
        others.remove(value)
        if instr.op == "add" and others == ["t1"]:
            steps.append(("residual", 0.0, 0.0))
        elif instr.op == "nn.relu":
            steps.append(("max", 0.0, 0.0))
        elif instr.op == "clip" and instr.args[0] == value and all(a[0] == "s" for a in others):
            low, high = (rest.scalars[int(a[1:])] for a in others)
            steps.append(("clip", low, high))
        else:
            return None
        value = f"v{i}"
    kinds = [s[0] for s in steps]
    return tuple(steps) if kinds.count("residual") <= 1 and kinds.count("clip") + kinds.count("max") <= 1 else None


def assemble(code: RowCode, gemm: Gemm) -> Code:
    """The code of a layer for ``gemm``, all of whose fields but ``code`` are known."""
    bias, _ = split_bias(gemm.epilogue)
    steps = fused(gemm.epilogue)
    masked = gemm.masked and steps is not None
    store_as = "vmovntps" if streams(gemm.stored) and steps is not None else "vmovups"
    residual = gemm.tensors[0].layout.c_pitch if gemm.tensors else 0
    pitch, pieces = 4 * gemm.dst.layout.c_pitch, len(code.code)
    lines = [
        ".text", ".p2align 6", ".type NAME,@function", "NAME:",
        "movl %r9d, %eax", "shrq $32, %r9", "leaq NAME_groups(%rip), %r10", "movslq (%r10,%rax,4), %rax",
        "addq %r10, %rax", *(["kmovw %r9d, %k1"] if masked else []), "shrl $16, %r9d", "jmp *%rax",
        ".p2align 2", "NAME_groups:", *(f".long NAME_{g} - NAME_groups" for g in range(pieces)),
    ]  # fmt: skip
    for g, body in enumerate(code.code):
        of = g % code.groups
        rows = range(int(code.rows[of + 1] - code.rows[of]))
        lines += [".p2align 6", f"NAME_{g}:", f"addq ${4 * int(code.starts[g]) + 2 * WINDOW}, %rsi"]
        lines += [f"leaq NAME_{code.following[g]}(%rip), %rax"]
        lines += [f"imull ${LINE * 4 * code.shares[g]}, %r9d, %r9d", "addq %r9, %rax"]
        if g >= code.groups:
            lines += [f"vmovups {r * pitch}(%rdx), %zmm{r}" for r in rows]
        elif bias:
            lines += [f"vbroadcastss {4 * r}(%rcx), %zmm{r}" for r in rows]
        else:
            lines += [f"vpxord %zmm{r}, %zmm{r}, %zmm{r}" for r in rows]
        lines += _literal(body)
        last = g >= pieces - code.groups
        lines += _finish(rows, (steps or ()) if last else (), masked and last, residual)
        lines += [f"{store_as if last else 'vmovups'} %zmm{r}, {r * pitch}(%rdx)" for r in rows]
        lines += ["vzeroupper", "retq"]
    name = "skimtvm_rows_" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    # Kernels of several batch sizes may share code: it is assembled once.
    lines = [f".ifndef {name}", *(line.replace("NAME", name) for line in lines), ".endif"]
    text = "\n".join(f'module asm "{line}"' for line in lines)
    text += f"\ndeclare void @{name}(ptr, ptr, ptr, ptr, ptr, i64)\n"
    return Code(name, code.groups, code.blocks, steps is not None, text)


def _literal(code: bytes) -> Iterator[str]:
    words = code[: len(code) // 8 * 8]
    values = [f"0x{v:x}" for v in np.frombuffer(words, "<u8").tolist()]
    for i in range(0, len(values), 64):
        yield ".quad " + ",".join(values[i : i + 64])
    if rest := code[len(words) :]:
        yield ".byte " + ",".join(map(str, rest))


def _finish(rows: range, steps: tuple[tuple[str, float, float], ...], masked: bool, residual: int) -> Iterator[str]:
    """Between the sums and their stores. zmm31 and zmm30 held the source and are free."""
    for kind, low, high in steps:
        if kind == "max":
            yield "vpxord %zmm31, %zmm31, %zmm31"
        elif kind == "clip":
            for register, bound in ((31, low), (30, high)):
                yield f"movl ${struct.unpack('<i', struct.pack('<f', bound))[0]}, %eax"
                yield f"vpbroadcastd %eax, %zmm{register}"
    for r in rows:
        for kind, _, _ in steps:
            if kind == "residual":
                yield f"vaddps {4 * r * residual}(%r8), %zmm{r}, %zmm{r}"
            else:  # a bound second: it is what comes of a NaN
                yield f"vmaxps %zmm31, %zmm{r}, %zmm{r}"
            if kind == "clip":
                yield f"vminps %zmm30, %zmm{r}, %zmm{r}"
        if masked:
            yield f"vmovaps %zmm{r}, %zmm{r} {{%k1}} {{z}}"


@contextmanager
def _only_if(condition: Any) -> Iterator[None]:
    with B.If(condition), B.Then():
        yield


class UnrolledBody(Body):
    """The loops around the code of a layer."""

    def _declare_weights(self) -> None:
        code = self.gemm.code
        assert code is not None
        self.fused = code.fused
        entries = B.int64()
        self.data = B.match_buffer(B.arg("data_p", B.handle()), (entries,), "float32")
        self.rows = B.arg("rows", B.Buffer((code.groups + 1,), "int32"))

    def _declare_mask(self) -> Any:
        return B.arg("mask", B.Buffer((self.gemm.vectors * (1 if self.fused else self.lanes),), "int32"))

    def emit(self) -> None:
        assert self.gemm.code is not None
        with B.attr(B.int32(0), "pragma_import_llvm", self.gemm.code.text):
            super().emit()

    def _tile(self, row: Any, tile: Any, chunk: Any, tiles: tuple[int, int, int], first_tile: int, total: int) -> None:
        first_vector, count, vectors = tiles
        q = Tile(self.gemm, row, B.bind(first_vector + (tile - first_tile) * vectors), self.band)
        edges = {"first": tile if first_tile == 0 else None, "last": tile if first_tile + count == total else None}
        q.at(0, self.gemm.strides), q.at(-1)  # bound out here
        assert self.gemm.code is not None
        blocks = self.gemm.code.blocks
        every = loop(blocks) if blocks > 1 else nullcontext(0)
        with every as block, span(self.cut[chunk], self.cut[chunk + 1]) as i:
            g = B.bind(i)
            first = B.bind(self.rows[g])
            piece = B.bind(block * self.gemm.code.groups + g) if blocks > 1 else g
            rows = None if self.fused else B.bind(self.rows[g + 1] - first)
            last = lambda: _only_if(block == blocks - 1) if blocks > 1 else nullcontext()
            at_once = vectors if self.fused else min(vectors, AT_ONCE)
            with loop(-(-vectors // at_once)) if at_once < vectors else nullcontext(0) as turn:
                start = B.bind(turn * at_once) if at_once < vectors else 0
                end = start + at_once if vectors % at_once == 0 else B.bind(B.min(start + at_once, vectors))
                with span(start, end) as v:
                    self._fetch(q, vectors, piece * vectors + v)
                    self._call(q, piece, first, v)
                if not self.fused:
                    with last():
                        self._apply(q, first, rows, (start, end))
            rows = B.bind(self.rows[g + 1] - first) if rows is None else rows
            if self.mask is not None:
                with last():
                    self._zero_edges(first, rows, edges, total)

    def _call(self, q: Tile, g: Any, first: Any, v: Any) -> None:
        gemm, code = self.gemm, self.gemm.code
        assert code is not None

        def at(buffer: Any, index: int) -> Any:
            slot = gemm.slots[index]
            return B.address_of(buffer[slot.base + first * slot.layout.c_pitch + q.at(index) + v * q.step(slot)])

        start = B.address_of(self.data[0])  # also where nothing is read: any valid address
        source = self.src[gemm.src.base + q.at(0, gemm.strides) + v * q.step(gemm.src, gemm.strides[1])]
        bias = B.address_of(self.consts[self.bias][first]) if self.bias else start
        residual = at(self.tensors[0][1], 1) if self.tensors and self.fused else start
        share = B.cast(B.min(v, RUNS), "int64")  # the runs behind repeat what is fetched after the last share
        word = B.cast(g, "int64") + B.shift_left(share, B.int64(48))
        if self.mask is not None and self.fused:
            word = word + B.shift_left(B.cast(self.mask[q.first + v], "int64"), B.int64(32))
        args = (B.address_of(source), start, at(self.out, -1), bias, residual, word)
        B.evaluate(B.call_extern("void", code.name, *args))

    def _fetch(self, q: Tile, vectors: int, part: Any) -> None:
        """Its share of the source of the next tile, in interleaved layouts."""
        gemm = self.gemm
        if not gemm.interleaved:
            return
        assert gemm.code is not None
        share = -(-gemm.lines(vectors) // (gemm.code.groups * gemm.code.blocks * vectors))
        ahead = gemm.below * gemm.src.layout.row_pitch + gemm.lines(vectors) * LINE
        following = B.bind(gemm.src.base + q.at(0, gemm.strides) + ahead + part * (share * LINE))
        with B.serial(0, share) as i:
            fetch(self.src, following + i * LINE, l1=False)

    def _apply(self, q: Tile, first: Any, rows: Any, vectors: tuple[Any, Any]) -> None:
        """The epilogue of a group's sums, which were stored as they are and still lie in L1."""
        slot = self.gemm.dst
        with B.serial(0, rows) as i, span(*vectors) as v:
            to = B.bind(slot.base + (first + i) * slot.layout.c_pitch + q.at(-1) + v * q.step(slot))
            at = lambda j, s: s.base + (first + i) * s.layout.c_pitch + q.at(j) + v * q.step(s)
            value = self._value(vector(self.out, to, self.lanes), first + i, at)
            store(self.out, self._masked(value, q, v), to, self.lanes)
