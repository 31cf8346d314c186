"""NumPy side of layouts: pack logical NCHW arrays into flat buffers, take them out again, and run one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..layout import Layout
from ..target import CpuTarget, lowering


def addresses(layout: Layout, channel: int = 0) -> np.ndarray:
    """int64[N, C, H, W]: where each pixel of a tensor lives whose channel 0 is channel ``channel`` of its buffer."""
    n, c, y, x = np.ogrid[: layout.n, channel : channel + layout.c, : layout.h, : layout.w]
    image = n // layout.interleave * layout.n_pitch + n % layout.interleave
    return layout.front + c * layout.c_pitch + image + y * layout.row_pitch + x * layout.x_pitch


def pack(
    array: np.ndarray, layout: Layout, *, size: int | None = None, channel: int = 0, fill: float = 0.0
) -> np.ndarray:
    """float32[size] with ``array`` (float32[N, C, H, W]) in ``layout`` and ``fill`` everywhere else."""
    buffer = np.full(layout.size if size is None else size, fill, np.float32)
    buffer[addresses(layout, channel)] = array
    return buffer


def unpack(buffer: np.ndarray, layout: Layout, channel: int = 0) -> np.ndarray:
    """The logical float32[N, C, H, W] that ``buffer`` holds."""
    return buffer[addresses(layout, channel)]


def compile_kernel(func: Any, target: CpuTarget) -> Any:
    """Executable of a single PrimFunc, which becomes its function ``main``."""
    import tvm

    with lowering():
        return tvm.compile(func.with_attr("global_symbol", "main"), target=target.tvm())


def run_kernel(func: Any, inputs: Sequence[np.ndarray], size: int | tuple[int, ...], target: CpuTarget) -> np.ndarray:
    """float32 of shape ``size`` that the kernel writes, prefilled with NaN so that floats it leaves alone show."""
    import tvm

    arguments = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs]
    out = tvm.runtime.tensor(np.full(size, np.nan, np.float32))
    compile_kernel(func, target)["main"](*arguments, out)
    return out.numpy()


def check_output(
    buffer: np.ndarray,
    want: np.ndarray,
    layout: Layout,
    *,
    channel: int = 0,
    rtol: float = 0.0,
    atol: float = 0.0,
    gaps: bool = False,
) -> None:
    """Assert what every kernel promises about a buffer that held NaN before it ran.

    The pixels are ``want`` (any float array [N, C, H, W]); the rest of the tensor's channels is 0 if the layout says
    so; nothing else was written, but between the rows of an image if the kernel may leave anything in the ``gaps``.
    """
    np.testing.assert_allclose(unpack(buffer, layout, channel), want, rtol=rtol, atol=atol)
    others = np.ones(buffer.size, bool)
    others[addresses(layout, channel)] = False
    if layout.zero_halo:
        own = np.zeros(buffer.size, bool)
        if layout.interleave > 1:
            first = np.arange(0, layout.size, layout.x_pitch) + channel * layout.c_pitch
            own[first[:, None] + np.arange(layout.c * layout.c_pitch)] = True
        else:
            own[channel * layout.c_pitch : (channel + layout.c) * layout.c_pitch] = True
        halo = np.flatnonzero(others & own & ~(buffer == 0))
        assert halo.size == 0, f"{halo.size} floats of the halo are not 0, the first at {halo[0]}"
        others &= ~own
    elif gaps:
        images = addresses(layout, channel)[..., 0, 0, None] + np.arange((layout.h - 1) * layout.row_pitch + layout.w)
        others[images] = False
    written = np.flatnonzero(others & ~np.isnan(buffer))
    assert written.size == 0, f"{written.size} floats outside of the tensor were written, the first at {written[0]}"
