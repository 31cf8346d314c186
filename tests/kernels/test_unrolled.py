"""Nonzeros as straight code: the instructions, and the kernel against float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from skimtvm.formats.unrolled import MOST_ROWS, REBASE, cut_rows, encode
from skimtvm.layout import Halo
from skimtvm.schedules.pointwise import Instr, Program
from skimtvm.schedules.unrolled import fused
from skimtvm.target import TARGETS
from skimtvm.workload import ConvWorkload

from .test_gather_gemm import BIAS_ADD_RELU, BIAS_RELU, BIAS_TANH_ADD, FORMATS, WORKLOADS, W, check, make

ZEN4 = TARGETS["znver4"]
UNROLLED = {"unrolled": True, "rows": MOST_ROWS, "lanes": 16, "aligned": False}


@pytest.mark.parametrize("fmt", ["csr", "csr-full", "csr-empty"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_matches_float64(name: str, fmt: str) -> None:
    check(make(WORKLOADS[name], ZEN4, fmt, residual=WORKLOADS[name].k > 8, vectors=3, **UNROLLED))


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("vectors", [1, 2, 100])
def test_groups_chunks_and_tiles_change_nothing(rows: int, chunks: int, vectors: int) -> None:
    check(make(W(1, 40, 12, 33, 3, p=1), ZEN4, "csr", **UNROLLED | {"rows": rows, "chunks": chunks, "vectors": vectors}))


def test_without_padding_behind() -> None:
    check(make(WORKLOADS["same3x3"], ZEN4, "csr", out_halo=Halo(), vectors=2, **UNROLLED))
