"""Small layers and records to tune and to log."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from skimtvm.layout import Space, interleaved, plane
from skimtvm.schedules import conv2d
from skimtvm.schedules.pointwise import Instr, Program, Slot
from skimtvm.schedules.sites import ConvSite, FcSite, Site, WinogradSite, version
from skimtvm.target import CpuTarget, resolve
from skimtvm.tune.log import Record, now
from skimtvm.tune.lookup import sparsity_of
from skimtvm.tune.tasks import Task
from skimtvm.workload import ConvWorkload, DenseWorkload

RELU = Program((Instr("add", ("t0", "c0")), Instr("nn.relu", ("v0",))), 1, 1)


def conv_site(
    c: int = 12, size: int = 13, k: int = 16, density: float = 0.2, kernel: str = "csr", rows: int = 1, seed: int = 0
) -> ConvSite:
    wl = ConvWorkload(1, c, size, size, k, 3, 3, padding=(1, 1, 1, 1))
    rng = np.random.default_rng(seed)
    keep = np.repeat(rng.random((k // rows, c, 3, 3)) < density, rows, axis=0)
    weight = (rng.standard_normal(wl.weight_shape) * keep).astype(np.float32)
    halo, space = conv2d.halo(wl), Space(size + 1, size + 1)
    src, dst = plane(1, c, size, size, space, halo), plane(1, k, size, size, space, halo)
    return ConvSite(
        kernel=kernel, rows=rows, stored=density, workload=wl, weight=weight, src=Slot(src, src.size),
        dst=Slot(dst, dst.size), epilogue=RELU,
    )  # fmt: skip


def winograd_site(
    c: int = 12, size: int = 13, k: int = 20, density: float = 0.3, kernel: str = "csr", images: int = 1, m: int = 4
) -> WinogradSite:
    wl = ConvWorkload(images, c, size, size, k, 3, 3, padding=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    shape = (k, c, m + 2, m + 2)
    weight = (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)
    halo = conv2d.halo(wl, interleaved=images > 1)
    if images > 1:
        src, dst = (interleaved(images, n, size, size, halo, images) for n in (c, k))
    else:
        src, dst = (plane(1, n, size, size, Space(size + 1, size + 1), halo) for n in (c, k))
    return WinogradSite(
        kernel=kernel, stored=density, workload=wl, weight=weight, src=Slot(src, src.size), dst=Slot(dst, dst.size),
        epilogue=RELU, m=m,
    )  # fmt: skip


def fc_site(k: int = 96, n: int = 40, density: float = 0.2) -> FcSite:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((k, n)) * (rng.random((k, n)) < density)).astype(np.float32)
    return FcSite(kernel="sell", stored=density, workload=DenseWorkload(1, k, n), weight=weight, epilogue=RELU)


def task(site: Site | None = None) -> Task:
    site = site or conv_site()
    return Task(site, resolve(), 1, sparsity_of(site), ("layer",))


def record(site: Site, target: CpuTarget | None = None, **more: Any) -> Record:
    """A best record of ``site`` with its default knobs, unless ``more`` says otherwise."""
    target = target or resolve()
    knobs = dataclasses.asdict(site.default(target))
    values: dict[str, Any] = {
        "kind": "best", "cpu": target.mcpu, "isa": target.isa, "kernel": site.name, "version": version(site.name, target),
        "workload": site.workload, "layout": site.layout, "sparsity": sparsity_of(site), "knobs": knobs,
        "default_knobs": knobs, "threads": 1, "median_s": 1e-3, "spread": (0.9e-3, 1.1e-3), "samples": 5,
        "default_s": 2e-3, "time": now(),
    }  # fmt: skip
    return Record(**(values | more))


def model(size: int = 14, channels: int = 64, density: float = 0.06, batch: int = 1) -> Any:
    """Two sparse 3x3 convolutions as onnx.ModelProto."""
    rng = np.random.default_rng(1)
    shape = (channels, channels, 3, 3)
    tensors = {
        name: (rng.standard_normal(shape) * (rng.random(shape) < d)).astype(np.float32)
        for name, d in (("w1", density), ("w2", density * 1.3))
    }
    pads = {"pads": [1, 1, 1, 1]}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["y"], name="first", **pads),
            helper.make_node("Relu", ["y"], ["z"]),
            helper.make_node("Conv", ["z", "w2"], ["out"], name="second", **pads),
        ],
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, channels, size, size))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, (batch, channels, size, size))],
        [numpy_helper.from_array(a, name) for name, a in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
