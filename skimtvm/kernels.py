"""The kernels with weights, one row each: what chooser, tests, benchmarks and tuner iterate over. Needs no TVM.

``efficiency`` is the share of the practical peak on the multiply-adds that a kernel does, measured on Zen 4, one thread,
3x3 and 1x1 layers of 64 to 512 channels at 7x7 to 56x56. That of ``csr`` is of its loop over offsets, which every machine
has (straight code for AVX-512, ``schedules/unrolled.py``: 0.5 to 0.84). The ``fc`` kernels (fully connected, few rows) are
bound by the bytes of the weights instead: ``weight_bytes`` a stored weight at ``efficiency`` of the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from .winograd import SIZES
from .workload import ConvWorkload, DenseWorkload, WinogradWorkload

# Both transforms of a vector of tiles, in cycles a channel, by (m, r); FLOPs at the peak in the time of a byte from memory.
TRANSFORM_CYCLES = {(2, 3): 60.0, (4, 3): 350.0, (4, 4): 550.0, (4, 5): 700.0}
FLOPS_PER_BYTE = 4.7
FEW_ROWS = 8  # batches below this run the fc kernels; from here on the images of a batch fill vectors


@dataclass(frozen=True)
class Kernel:
    """``name``: what ``--force`` takes; ``rows``: R of the R x 1 blocks that are stored (0: every weight);
    ``definition``: the TE compute definition and oracle; ``schedule``: where its template is. ``winograd``: m of the
    F(m x m, r x r) that it computes by; 0: it multiplies pixels."""

    name: str
    op: str  # conv2d, winograd (weights of positions, not of pixels), or fc
    rows: int
    efficiency: float
    weight_bytes: float
    definition: str
    schedule: str
    winograd: int = 0

    def rejects(self, workload: ConvWorkload | DenseWorkload) -> str:
        """Why the kernel cannot run ``workload``; empty when it can."""
        few = isinstance(workload, DenseWorkload) and workload.m < FEW_ROWS
        if few and self.op != "fc":
            return f"a dense layer of fewer than {FEW_ROWS} rows runs a kernel of its own"
        if not few and self.op == "fc":
            return f"made for dense layers of fewer than {FEW_ROWS} rows"
        native = isinstance(workload, WinogradWorkload)
        if not few and native != (self.op == "winograd"):
            return "made for weights of Winograd positions" if not native else "the layer has weights of positions"
        if self.winograd:
            if not isinstance(workload, ConvWorkload):
                return "made for convolutions"
            view = workload.winograd_view
            square = view.kh == view.kw and (self.winograd, view.kh) in SIZES
            plain = workload.dilation == (1, 1) and view.out_shape == workload.out_shape
            if not square or not (plain or workload.undilated is not None):
                sizes = " or ".join(f"{r}x{r}" for m, r in SIZES if m == self.winograd)
                return f"made for {sizes} filters, of stride 1 or of the phases of a strided or dilated convolution"
        if self.rows > 1:
            per_group = workload.k // workload.groups if isinstance(workload, ConvWorkload) else workload.n
            if per_group % self.rows:
                return f"{per_group} output channels do not divide into blocks of {self.rows}"
        return ""


_CONV, _FC = "skimtvm.ops.conv2d", "skimtvm.ops.dense"
_WINOGRAD = "skimtvm.ops.winograd:winograd_conv2d"
_GATHER, _ROWS, _SELL, _TILES = (f"skimtvm.schedules.{n}" for n in ("gather_gemm", "dense", "sell", "winograd"))

KERNELS = (
    Kernel("dense", "conv2d", 0, 0.93, 4, f"{_CONV}:conv2d", _GATHER),
    Kernel("csr", "conv2d", 1, 0.50, 8, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr4", "conv2d", 4, 0.80, 5, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr8", "conv2d", 8, 0.85, 4.5, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("bsr16", "conv2d", 16, 0.85, 4.25, f"{_CONV}:csr_conv2d", _GATHER),
    Kernel("winograd4", "conv2d", 0, 0.85, 4, _WINOGRAD, _TILES, winograd=4),
    Kernel("winograd2", "conv2d", 0, 0.88, 4, _WINOGRAD, _TILES, winograd=2),
    Kernel("dense", "winograd", 0, 0.85, 4, _WINOGRAD, _TILES),
    Kernel("csr", "winograd", 1, 0.45, 8, "skimtvm.ops.winograd:winograd_csr_conv2d", _TILES),
    Kernel("dense", "fc", 0, 0.90, 4, f"{_FC}:dense", _ROWS),
    Kernel("sell", "fc", 1, 0.70, 5.5, f"{_FC}:sell_dense", _SELL),
)


def applicable(workload: ConvWorkload | DenseWorkload) -> tuple[Kernel, ...]:
    """Kernels that can run ``workload``, dense first."""
    return tuple(k for k in KERNELS if not k.rejects(workload))
