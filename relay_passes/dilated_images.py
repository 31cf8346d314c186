"""Dilated convolutions with a Winograd kernel run on images of the pixels that lie a dilation apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tvm import relax

from ..chooser import Choice
from ..schedules.dilation import DilationWorkload
from .nodes import Node


def as_images(nodes: list[Node], choices: Mapping[str, Choice]) -> list[Node]:
    """``nodes`` where such a convolution stands between ``to_images`` and ``from_images``."""
    result: list[Node] = []
    for n in nodes:
        view = n.workload.undilated if n.kind == "conv2d" else None
        if view is None or n.layer is None or not choices[n.layer.name].winograd:
            result.append(n)
            continue
        apart = DilationWorkload(*n.workload.dilation)

        def value(name: str, *shape: int) -> Any:
            return relax.Var(name, relax.TensorType(shape, "float32"))

        parts = value(f"{n.var.name}_parts", view.n, view.c, view.h, view.w)
        out = value(f"{n.var.name}_images", *view.out_shape)
        result.append(Node("to_images", parts, [n.inputs[0]], workload=apart))
        result.append(dataclasses.replace(n, var=out, inputs=[parts, *n.inputs[1:]], workload=view))
        result.append(Node("from_images", n.var, [out], workload=apart))
    return result
