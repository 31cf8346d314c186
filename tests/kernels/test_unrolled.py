"""Nonzeros as straight code: the instructions, and the kernel against float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from skimtvm.formats.unrolled import MOST_ROWS, cut_rows, encode
from skimtvm.layout import Halo
from skimtvm.ops.packing import unpack
from skimtvm.schedules import gather_gemm
from skimtvm.schedules.knobs import footprint
from skimtvm.schedules.pointwise import Instr, Program
from skimtvm.schedules.unrolled import AT_ONCE, fused
from skimtvm.schedules.unrolled_knobs import tiles
from skimtvm.target import TARGETS

from ..tune.samples import conv_site
from .helpers import conv_reference, gamma, gaps
from .test_gather_gemm import BIAS_ADD_RELU, BIAS_RELU, BIAS_TANH_ADD, WORKLOADS, W, check, make
from .test_interleaved import WORKLOADS as INTERLEAVED
from .test_interleaved import check as check_interleaved
from .test_interleaved import streams

ZEN4, AVX2 = TARGETS["znver4"], TARGETS["haswell"]
WITHOUT_ROWS: dict[str, Any] = {"unrolled": True, "lanes": 16, "aligned": False}
UNROLLED = WITHOUT_ROWS | {"rows": MOST_ROWS}
TALL = W(1, 5, 28, 40, 3, p=1)  # more vectors than wait for an epilogue at once, and not a multiple of them
BIAS_CLIP = Program((Instr("add", ("t0", "c0")), Instr("clip", ("v0", "s0", "s1"))), 1, 1, scalars=(-0.25, 1.5))


def run(code: bytes) -> list[tuple[int, int, int]]:
    """(sum, bytes from the source, weight) of each multiply-add; no instructions but those that the format documents."""
    at = rdi = 0
    rsi, register, done = 512, dict[int, int](), []
    number = lambda i: int.from_bytes(code[i : i + 4], "little", signed=True)
    byte = lambda i: code[i] - 256 * (code[i] > 127)
    while at < len(code):
        if code[at] == 0x48:
            short = code[at + 1] == 0x83
            assert short or code[at + 1] == 0x81
            by = byte(at + 3) if short else number(at + 3)
            if code[at + 2] == 0xC7:
                rdi += by
            else:
                assert code[at + 2] == 0xC6
                rsi += by
            at += 4 if short else 7
        elif code[at : at + 3] == b"\x0f\x18\x90":
            at += 7
        else:
            assert code[at] == 0x62
            p1, p2, p3, opcode, modrm = code[at + 1 : at + 6]
            to = (modrm >> 3 & 7) | (~p1 >> 7 & 1) << 3 | (~p1 >> 4 & 1) << 4
            if opcode == 0x10:
                short = modrm >> 6 == 1
                register[to] = rdi + (64 * byte(at + 6) if short else number(at + 6))
                at += 7 if short else 10
            else:
                assert opcode == 0xB8
                source = (~p2 >> 3 & 15) | (~p3 >> 3 & 1) << 4
                done.append((to, register[source], (rsi + 4 * byte(at + 6)) // 4))
                at += 7
    return done


@pytest.mark.parametrize("apart", [16, 37])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_the_code_of_a_group_is_its_nonzeros(density: float, apart: int) -> None:
    """Short and long displacements, new bases, more than 256 weights."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((67, 900)) * (rng.random((67, 900)) < density)).astype(np.float32)
    address = (rng.permutation(900) * apart - 4000).astype(np.int32)
    code = encode(weight, address, runs=3)
    column = {int(a) * 4: i for i, a in enumerate(address)}
    assert list(code.rows) == [0, 30, 60, 67] and code.data.size == np.count_nonzero(weight)
    got = np.zeros_like(weight)
    for first, start, body in zip(code.rows, code.starts, code.code, strict=False):
        done = run(body)
        assert len({d[2] for d in done}) == len(done)
        for row, where, entry in done:
            got[first + row, column[where]] = code.data[start + entry]
    np.testing.assert_array_equal(got, weight)
    assert sum(map(len, code.code)) <= 7 * code.data.size + 10.1 * code.loads.sum() + 7 * sum(code.shares) + 200
    loads = [np.count_nonzero(weight[a:b].any(axis=0)) for a, b in zip(code.rows, code.rows[1:], strict=False)]
    assert list(code.loads) == loads, "one load a column and group"


def test_blocks_hold_their_columns_and_fetch_what_runs_next() -> None:
    """Two chunks of row groups, each of which runs three blocks of columns."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((120, 300)) * (rng.random((120, 300)) < 0.3)).astype(np.float32)
    address = (np.arange(300) * 16).astype(np.int32)
    code = encode(weight, address, runs=3, block=128, chunks=2)
    assert (code.groups, code.blocks) == (4, 3) and list(code.cut) == [0, 2, 4]
    got = np.zeros_like(weight)
    for piece, (start, body) in enumerate(zip(code.starts, code.code, strict=True)):
        block, group = divmod(piece, code.groups)
        for row, where, entry in run(body):
            assert 128 * block <= where // 64 < 128 * (block + 1)
            got[code.rows[group] + row, where // 64] = code.data[start + entry]
    np.testing.assert_array_equal(got, weight)
    piece, order = 0, []
    for _ in code.code:
        order.append(piece)
        piece = code.following[piece]
    assert order == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11] and piece == 0
    for piece, share in enumerate(code.shares):
        assert abs(share * 3 * 64 - len(code.code[code.following[piece]]) - 30 * 30) < 0.2 * share * 3 * 64


def test_loads_take_the_short_form() -> None:
    """Nine taps on 64 channels: a new base for each 16 KB and tap, of four bytes where only the tap changes."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((30, 64 * 9)) * (rng.random((30, 64 * 9)) < 0.1)).astype(np.float32)
    tap = np.add.outer(np.array([-58, 0, 58]), np.array([-1, 0, 1])).ravel()
    near = encode(weight, np.add.outer(np.arange(64) * 48, tap).ravel().astype(np.int32), runs=1 << 30)
    assert near.data.size * 7 + near.loads.sum() * 7.4 > len(near.code[0])
    far = encode(weight, np.add.outer(np.arange(64) * 8192, tap).ravel().astype(np.int32), runs=1 << 30)
    assert near.data.size * 7 + near.loads.sum() * 9.9 < len(far.code[0])


@pytest.mark.parametrize("k", range(1, 130, 3))
@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 30])
def test_groups_are_full_but_for_the_last(k: int, most: int) -> None:
    sizes = np.diff(cut_rows(k, most))
    halves = np.diff(cut_rows(2 * k, most, 2))
    assert (halves == [*sizes, *sizes]).all()
    assert sizes.sum() == k and sizes.min() >= 1 and sizes.max() <= most and sizes.size == -(-k // most)
    assert (sizes[:-2] == most).all() and (k <= most or sizes[-1] >= min(4, most) or sizes[-2] == 1)
    assert sizes[:-1].sum() >= most * (sizes.size - 1) - 3


@pytest.mark.parametrize("fmt", ["csr", "csr-full", "csr-empty"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_matches_float64(name: str, fmt: str) -> None:
    check(make(WORKLOADS[name], ZEN4, fmt, residual=WORKLOADS[name].k > 8, vectors=3, **UNROLLED))


@pytest.mark.parametrize("fmt", ["csr", "csr-full", "csr-empty"])
@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_matches_float64(name: str, fmt: str) -> None:
    check_interleaved(INTERLEAVED[name], fmt, ZEN4, vectors=3, residual=fmt == "csr", **UNROLLED)


@pytest.mark.parametrize("fmt", ["csr", "csr-full", "csr-empty"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_blocks_of_channels(name: str, fmt: str) -> None:
    """Sums that wait in the output, of groups in chunks, beside residuals and gaps."""
    wl = WORKLOADS[name]
    block = -(-wl.c // wl.groups // 3)
    case = make(wl, ZEN4, fmt, residual=wl.k > 8, vectors=3, rows=7, chunks=2, channel_block=block, **WITHOUT_ROWS)
    assert case.kernel.gemm.code is not None and case.kernel.gemm.code.blocks == -(-wl.c // wl.groups // block)
    check(case)


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_blocks_of_channels(name: str) -> None:
    wl = INTERLEAVED[name]
    check_interleaved(wl, "csr", ZEN4, vectors=3, residual=True, channel_block=-(-wl.c // wl.groups // 2), **UNROLLED)


def test_stores_past_the_caches() -> None:
    """But for sums that later blocks of channels load again."""
    wl = W(16, 5, 9, 7, 3, p=1)
    for streamed in (False, True):
        case = check_interleaved(wl, "csr", ZEN4, streamed=streamed, vectors=4, channel_block=5, **UNROLLED)
        assert streams(case) == streamed
    assert not streams(check_interleaved(wl, "csr", ZEN4, streamed=True, vectors=4, channel_block=2, **UNROLLED))


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("vectors", [1, 2, 100])
def test_groups_chunks_and_tiles_change_nothing(rows: int, chunks: int, vectors: int) -> None:
    knobs = UNROLLED | {"rows": rows, "chunks": chunks, "vectors": vectors}
    check(make(W(1, 40, 12, 33, 3, p=1), ZEN4, "csr", **knobs))


def test_without_padding_behind() -> None:
    check(make(WORKLOADS["same3x3"], ZEN4, "csr", out_halo=Halo(), vectors=2, **UNROLLED))


@pytest.mark.parametrize("epilogue", [BIAS_TANH_ADD, BIAS_CLIP, Program()], ids=["long", "clip", "none"])
@pytest.mark.parametrize("name", ["same3x3", "batch2-k17", "wide", "tall"])
@pytest.mark.parametrize("block", [1, 100])
@pytest.mark.parametrize("vectors", [2, 100])
def test_epilogues(vectors: int, block: int, name: str, epilogue: Program) -> None:
    """What the code does not do itself runs on what it stored; both leave zeros around the pixels."""
    wl, long = TALL if name == "tall" else WORKLOADS[name], epilogue is BIAS_TANH_ADD
    case = make(wl, ZEN4, "csr", residual=long, epilogue=epilogue, vectors=vectors, channel_block=block, **UNROLLED)
    if not epilogue.channels:
        case.args.pop(-2)  # the bias
        case.bias[:] = 0
    flat = case.run()
    total = conv_reference(wl, case.x, case.w) + case.bias[:, None, None]
    expected = np.tanh(total) + case.residual if long else np.clip(total, -0.25, 1.5) if epilogue.channels else total
    scale = conv_reference(wl, np.abs(case.x), np.abs(case.w)) + np.abs(case.bias)[:, None, None]
    error = np.abs(unpack(flat, case.dst) - expected)
    assert (error <= gamma(wl.row_length) * scale + 4e-7 * (1 + np.abs(expected)) * long + 1e-30).all(), error.max()
    assert not gaps(flat, case.dst).any() and np.isnan(flat[case.dst.c * case.dst.c_pitch :]).all()


def test_a_long_epilogue_runs_on_what_is_still_in_l1() -> None:
    """After a few vectors, not after a tile, and the model counts it where loops have it in registers."""
    case = make(TALL, ZEN4, "csr", residual=True, epilogue=BIAS_TANH_ADD, vectors=100, **UNROLLED)
    script = gather_gemm.emit(case.kernel.gemm).script()
    total = case.kernel.gemm.vectors
    assert total % AT_ONCE and total > AT_ONCE
    assert f"range({-(-total // AT_ONCE)})" in script and f"range({total})" not in script
    short = conv_site(c=32, size=28, k=64, density=0.1)
    long = dataclasses.replace(short, epilogue=Program((Instr("add", ("t0", "c0")), Instr("tanh", ("v0",))), 1, 1))
    looped, straight = short.looped(ZEN4), short.straight(ZEN4)[0]
    assert long.cycles(looped, ZEN4) == short.cycles(looped, ZEN4)
    assert long.cycles(straight, ZEN4) > short.cycles(straight, ZEN4)


def test_what_the_code_does_itself() -> None:
    assert fused(BIAS_RELU) == (("max", 0.0, 0.0),) and fused(Program()) == ()
    assert fused(BIAS_ADD_RELU) == (("residual", 0.0, 0.0), ("max", 0.0, 0.0))
    assert fused(BIAS_CLIP) == (("clip", -0.25, 1.5),)
    double = Program((Instr("add", ("t0", "t0")),), 1, 0)
    two = Program((Instr("add", ("t0", "t1")), Instr("add", ("v0", "t1"))), 2, 0)
    assert fused(BIAS_TANH_ADD) is fused(double) is fused(two) is None


def test_a_nan_becomes_what_the_other_kernels_make_of_it() -> None:
    wl = WORKLOADS["same3x3"]
    results = []
    for knobs in ({}, UNROLLED | {"vectors": 2}):
        case = make(wl, ZEN4, "csr-full", **knobs)
        case.args[0].numpy()
        x = case.args[0].numpy().copy()
        x[np.flatnonzero(x == case.x[0, 2, 4, 4])] = np.nan
        case.args[0].copyfrom(x)
        results.append(unpack(case.run(), case.dst))
    np.testing.assert_array_equal(results[0] == 0, results[1] == 0)
    assert np.isfinite(results[0]).all() and np.isfinite(results[1]).all()


def test_hot_code_is_inline_and_shared_code_stands_once() -> None:
    case = make(W(1, 32, 28, 40, 3, p=1), ZEN4, "csr", residual=True, **UNROLLED)
    asm = case.executable.mod.inspect_source("asm")
    names = re.findall(r"^(skimtvm_rows_[0-9a-f]{16}):", asm, re.M)
    assert len(names) == 1 and asm.count(f"{names[0]}@PLT") + asm.count(f"callq\t{names[0]}") >= 1
    assert not re.findall(r"vmov[au]ps\s+%zmm\d+, -?\d*\(%r[sb]p\)", asm), "sums are stored to the output only"
    gemm = case.kernel.gemm
    assert gemm.code is not None and gemm.code.groups == 2 and ".ifndef" in gemm.code.text
    again = make(W(1, 32, 28, 40, 3, p=1), ZEN4, "csr", residual=True, **UNROLLED).kernel.gemm
    assert again == gemm and hash(again) == hash(gemm)


def test_two_threads_share_a_tile_evenly() -> None:
    """One tile of all positions: nine groups of 30 would be five and four."""
    site = conv_site(c=32, size=14, k=256, density=0.1)
    knobs = next(k for k in site.space(ZEN4).unrolled if k.vectors == 14)
    assert knobs.chunks == 8
    _, rows, cut, *_ = site.build(knobs, ZEN4).constants
    assert rows[cut[4]] == 128 and list(np.diff(rows)) == 2 * [30, 30, 30, 30, 8]
    apart = conv_site(c=32, size=28, k=64, density=0.1)  # whole tiles for each thread, but for the one in the middle
    knobs = next(k for k in apart.space(ZEN4).unrolled if tiles(k, apart.dst) == 7)
    _, rows, cut, *_ = apart.build(knobs, ZEN4).constants
    assert list(rows) == [0, 30, 60, 64] and list(cut) == [0, 1, 3]


def test_blocks_of_channels_where_a_tile_leaves_l2() -> None:
    wide = conv_site(c=3072, size=14, k=96, density=0.1)
    for knobs in wide.space(ZEN4).unrolled:
        touched = footprint(wide.workload, knobs, wide.src, wide.taps)
        assert knobs.channel_block == 3072 or touched <= ZEN4.l2_bytes / 4
        assert wide.adapt(knobs, ZEN4) == knobs
    blocked = [k for k in wide.space(ZEN4).unrolled if k.channel_block < 3072]
    assert blocked and wide.default(ZEN4) in blocked
    for site in (conv_site(c=64, size=28, k=96, density=0.1), conv_site(c=512, size=7, k=96, density=0.1)):
        assert all(k.channel_block == site.workload.c for k in site.space(ZEN4).unrolled)


def test_who_takes_straight_code() -> None:
    """Unstructured layers with enough pixels for their weights, on AVX-512."""
    body = conv_site(c=64, size=28, k=64, density=0.1)
    assert body.default(ZEN4).unrolled and not body.default(AVX2).unrolled
    assert not any(k.unrolled for k in body.space(AVX2)) and any(k.unrolled for k in body.space(ZEN4))
    assert not conv_site(c=64, size=28, k=64, density=0.1, kernel="bsr4", rows=4).default(ZEN4).unrolled
    few = conv_site(c=1024, size=1, k=1024, density=0.1)
    assert not few.default(ZEN4).unrolled, "code for one vector would be read for nothing"
    tall = dataclasses.replace(body.default(ZEN4), vectors=7)
    assert body.adapt(tall, ZEN4).vectors == 7 and body.adapt(tall, AVX2) is None
