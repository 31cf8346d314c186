"""The kernels with weights, one row each: what chooser, tests, benchmarks and tuner iterate over. Needs no TVM.

``efficiency`` is the share of the practical peak on the multiply-adds that a kernel does, measured on Zen 4, one thread,
3x3 and 1x1 layers of 64 to 512 channels at 7x7 to 56x56. The ``fc`` kernels (fully connected, few rows) are bound by the
bytes of the weights instead: ``weight_bytes`` a stored weight at ``efficiency`` of the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from .workload import ConvWorkload, DenseWorkload

FEW_ROWS = 8  # batches below this run the fc kernels; from here on the images of a batch fill vectors


@dataclass(frozen=True)
class Kernel:
    """``name``: what ``--force`` takes; ``rows``: R of the R x 1 blocks that are stored (0: every weight);
    ``definition``: the TE compute definition and oracle; ``schedule``: where its template is."""

    name: str
    op: str  # conv2d, or fc
    rows: int
    efficiency: float
    weight_bytes: float
    definition: str
    schedule: str

    def rejects(self, workload: ConvWorkload | DenseWorkload) -> str:
        """Why the kernel cannot run ``workload``; empty when it can."""
        few = isinstance(workload, DenseWorkload) and workload.m < FEW_ROWS
        if few and self.op != "fc":
            return f"a dense layer of fewer than {FEW_ROWS} rows runs a kernel of its own"
        if not few and self.op == "fc":
            return f"made for dense layers of fewer than {FEW_ROWS} rows"
        if self.rows > 1:
            per_group = workload.k // workload.groups if isinstance(workload, ConvWorkload) else workload.n
            if per_group % self.rows:
                return f"{per_group} output channels do not divide into blocks of {self.rows}"
        return ""


_CONV, _FC = "skimtvm.ops.conv2d", "skimtvm.ops.dense"
_GATHER, _ROWS = "skimtvm.schedules.gather_gemm", "skimtvm.schedules.dense"

KERNELS = (
    Kernel("dense", "conv2d", 0, 0.93, 4, f"{_CONV}:conv2d", _GATHER),
    Kernel("csr", "conv2d", 1, 0.50, 8, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr4", "conv2d", 4, 0.80, 5, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr8", "conv2d", 8, 0.85, 4.5, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr16", "conv2d", 16, 0.85, 4.25, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("dense", "fc", 0, 0.90, 4, f"{_FC}:dense", _ROWS),
    Kernel("csr", "fc", 1, 0.70, 6, f"{_FC}:csr_dense", _ROWS),
)


def applicable(workload: ConvWorkload | DenseWorkload) -> tuple[Kernel, ...]:
    """Kernels that can run ``workload``, dense first."""
    return tuple(k for k in KERNELS if not k.rejects(workload))
