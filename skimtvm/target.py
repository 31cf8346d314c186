"""Target CPUs: vector width, registers and cache of the machine that a module is compiled for.

The figures steer schedules; only ``mcpu`` reaches LLVM. Importing this module does not load the TVM compiler.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidOption

AVX512 = ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd")
AVX2 = ("avx2", "fma")

# Passes of TVM's pipeline that leave the machine code of our kernels as it is, in up to a fifth of the time that a kernel
# takes to compile: they move branches, of which the loops have none, and serve GPUs.
IDLE_PASSES = ("s_tir.HoistIfThenElse", "s_tir.InjectPermutedLayout", "s_tir.InjectVirtualThread")


@dataclass(frozen=True)
class CpuTarget:
    """``lanes``: float32 in a vector register; ``registers``: architectural vector registers; caches per core."""

    mcpu: str
    isa: str  # avx512 or avx2: the word in kernel names
    lanes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    features: tuple[str, ...]  # /proc/cpuinfo flags without which the code would stop with SIGILL

    def tvm(self) -> Any:
        """The ``tvm.target.Target`` of this CPU."""
        from tvm.target import Target

        # LLVM prefers ymm on the Intel models; explicit 16-lane vectors stay zmm either way, and so must its own loops.
        extra = {"mattr": ["-prefer-256-bit"]} if self.isa == "avx512" else {}
        return Target({"kind": "llvm", "mcpu": self.mcpu, "num-cores": 1, **extra})


def lowering() -> Any:
    """The ``tvm.transform.PassContext`` in which kernels become machine code."""
    from tvm.ir.transform import PassContext

    return PassContext(disabled_pass=IDLE_PASSES)


def _avx512(mcpu: str, l1: int, l2: int, *more: str) -> CpuTarget:
    return CpuTarget(mcpu, "avx512", 16, 32, l1 << 10, l2 << 10, (*AVX2, *AVX512, *more))


def _avx2(mcpu: str, l1: int, l2: int, *more: str) -> CpuTarget:
    return CpuTarget(mcpu, "avx2", 8, 16, l1 << 10, l2 << 10, (*AVX2, *more))


# LLVM CPU names, with L1d and L2 in KiB a core (vendors' optimisation manuals).
TARGETS = {
    t.mcpu: t
    for t in (
        _avx512("znver5", 48, 1024, "avx512_vnni", "avx512_bf16"),
        _avx512("znver4", 32, 1024, "avx512_vnni", "avx512_bf16"),
        _avx512("sapphirerapids", 48, 2048, "avx512_vnni", "avx512_bf16"),
        _avx512("icelake-server", 48, 1280, "avx512_vnni"),
        _avx512("cascadelake", 32, 1024, "avx512_vnni"),
        _avx512("skylake-avx512", 32, 1024),
        _avx512("x86-64-v4", 32, 1024),
        _avx2("znver3", 32, 512),
        _avx2("znver2", 32, 512),
        _avx2("alderlake", 32, 1280),
        _avx2("skylake", 32, 256),
        _avx2("haswell", 32, 256),
        _avx2("x86-64-v3", 32, 256),
    )
}


def host_features() -> frozenset[str]:
    """x86 feature flags of this machine, in the spelling of /proc/cpuinfo; empty where there is no such file."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def host_cpu_name() -> str:
    """LLVM's name of this machine's CPU."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def resolve(name: str = "auto") -> CpuTarget:
    """The target called ``name``; ``auto`` is this machine.

    Raises InvalidOption for a name that is not in the table, and for ``auto`` on a machine without AVX2.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name != "auto":
        raise InvalidOption(f"target '{name}' is unknown; choose auto or one of {', '.join(sorted(TARGETS))}")
    have, cpu = host_features(), host_cpu_name()
    if cpu in TARGETS and have.issuperset(TARGETS[cpu].features):
        return TARGETS[cpu]
    for generic in ("x86-64-v4", "x86-64-v3"):
        if have.issuperset(TARGETS[generic].features):
            return TARGETS[generic]
    raise InvalidOption(
        f"target auto: this machine ({platform.machine()}, {cpu}) has no AVX2 and FMA; "
        "name the CPU to compile for with --target"
    )
