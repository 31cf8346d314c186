"""Put the same network, lowered for several batch sizes, into one module. Works on lowered modules.

Equal kernels become one function here; equal constants (the weights, wherever two sizes store them in the same layout)
become one when TVM's code generator pools constants by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax

from .join_batch import inline


def join_sizes(modules: Mapping[str, tvm.IRModule]) -> tvm.IRModule:
    """One module in which the ``main`` of each of ``modules`` has the name that is its key there."""
    bb = relax.BlockBuilder()
    for name, mod in modules.items():
        renamed: dict[Any, Any] = {
            gv: bb.add_func(f, gv.name_hint) for gv, f in mod.functions.items() if gv.name_hint != "main"
        }
        main = mod["main"]
        params = list(main.params)
        with bb.function(name, params, attrs={"num_input": len(params)}):
            with bb.dataflow():
                out = bb.emit_output(inline(bb, main, params, renamed))
            bb.emit_func_output(out)
    return bb.get()
