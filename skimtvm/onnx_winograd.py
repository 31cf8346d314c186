"""Keep native Winograd layers whole while a model is imported.

A call of the function of ``winograd.py`` becomes a Conv whose filters are the t x t weights of the positions, with m - 1
more padding at the bottom and at the right. That has the shapes of the layer, and is linear in the weights of an output
or input channel like it, so every graph pass that moves a factor of a channel into the weights stays right; it is never
computed. ``FuseLayers`` makes it a Winograd layer again. Functions of that name with another body are inlined like any
other.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.inliner

from .onnx_read import opset_of
from .winograd import DOMAIN, MIN_OPSET, function_names, function_proto, transform


def _is_ours(function: Any) -> bool:
    sizes = function_names().get(function.name) if function.domain == DOMAIN else None
    opset = max((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if sizes is None or opset < MIN_OPSET:
        return False
    known = function_proto(*sizes, opset)
    return all(getattr(function, part) == getattr(known, part) for part in ("input", "output", "attribute", "node"))


def inline_functions(model: Any) -> tuple[Any, dict[str, tuple[int, int]]]:
    """``model`` without functions, and output name -> (m, r) of the Conv nodes that stand for native Winograd layers."""
    if not model.functions:
        return model, {}
    ours = [(f.domain, f.name) for f in model.functions if _is_ours(f)]
    layers: dict[str, tuple[int, int]] = {}
    if ours and opset_of(model) >= MIN_OPSET:
        model = onnx.inliner.inline_selected_functions(model, ours, exclude=True)
        for node in model.graph.node:
            if (node.domain, node.op_type) in ours:
                layers[node.output[0]] = function_names()[node.op_type]
                _to_conv(node)
    if model.functions:  # also those calls of ours that are in subgraphs
        model = onnx.inliner.inline_local_functions(model)
    del model.functions[:]
    return model, layers


def _to_conv(node: Any) -> None:
    f = transform(*function_names()[node.op_type])
    top, left, bottom, right = next(a.ints for a in node.attribute if a.name == "pads")
    del node.attribute[:]
    node.op_type, node.domain = "Conv", ""
    attributes = {"kernel_shape": [f.tile, f.tile], "pads": [top, left, bottom + f.m - 1, right + f.m - 1]}
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
