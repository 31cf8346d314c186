"""What is left out of TVM's pipeline changes nothing."""

from __future__ import annotations

import pytest
import tvm

from skimtvm.ops.packing import compile_kernel
from skimtvm.schedules.sites import _samples
from skimtvm.target import IDLE_PASSES, TARGETS


@pytest.mark.parametrize(
    ("kernel", "op"),
    [("csr", "conv2d"), ("bsr4", "conv2d"), ("sell", "fc"), ("dense", "winograd2"), ("csr", "winograd2")],
)
def test_idle_passes_leave_the_machine_code_of_templates(kernel: str, op: str) -> None:
    target = TARGETS["znver4"]
    site, _ = _samples(kernel, op, target)[0]
    func = site.build(site.default(target), target).emit()
    whole = tvm.compile(func.with_attr("global_symbol", "main"), target=target.tvm())
    assert compile_kernel(func, target).mod.inspect_source("asm") == whole.mod.inspect_source("asm")


def test_idle_passes_are_passes_of_the_pipeline() -> None:
    """A name that TVM does not know would be ignored."""
    ran = []

    @tvm.instrument.pass_instrument
    class Names:
        def run_before_pass(self, mod: object, info: object) -> None:
            ran.append(info.name)

    site, _ = _samples("dense", "fc", TARGETS["haswell"])[0]
    func = site.build(site.default(TARGETS["haswell"]), TARGETS["haswell"]).emit()
    with tvm.transform.PassContext(instruments=[Names()]):
        tvm.compile(func.with_attr("global_symbol", "main"), target=TARGETS["haswell"].tvm())
    assert set(IDLE_PASSES) <= set(ran)
