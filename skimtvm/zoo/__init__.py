"""Well-known networks with seeded random weights, pruned on request: for examples, tests and measurements.

The weights keep the variance of activations about constant from the first layer to the last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import numpy_helper

from ..errors import InvalidOption
from . import light, transformer
from .light import NAMES
from .pruning import parse_pattern, prune
from .tables import has_table, seed_table
from .transformer import TRANSFORMERS

__all__ = [
    "NAMES",
    "NETWORKS",
    "TRANSFORMERS",
    "build",
    "check_name",
    "has_table",
    "parse_pattern",
    "prune",
    "seed_table",
    "weights",
]

NETWORKS = tuple(sorted([*NAMES, *TRANSFORMERS]))


def check_name(name: str) -> None:
    """Raises InvalidOption unless ``name`` is one of NETWORKS."""
    if name not in NETWORKS:
        raise InvalidOption(f"network '{name}' is not in the zoo; choose one of {', '.join(NETWORKS)}")


def _options(
    name: str, sparsity: float | str | None, batch: int, pattern: str | None
) -> tuple[float | dict[str, float], int]:
    check_name(name)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InvalidOption(f"batch is {batch!r}; give a whole number of at least 1")
    rows = 1 if pattern is None else parse_pattern(pattern)
    if pattern is not None and sparsity is None:
        raise InvalidOption(f"pattern '{pattern}' needs a sparsity; give one from 0 to below 1")
    if sparsity == "seed":
        return seed_table(name), rows
    try:
        value = 0.0 if sparsity is None else float(sparsity)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < 1:
        raise InvalidOption(f"sparsity is {sparsity!r}; give a share of zeros from 0 to below 1, or 'seed'")
    return value, rows


def build(
    name: str,
    *,
    sparsity: float | str | None = None,
    seed: int = 0,
    batch: int = 1,
    keep_first: bool = False,
    pattern: str | None = None,
) -> Any:
    """The network ``name`` (see NETWORKS) as an onnx.ModelProto with float32 weights as initializers.

    ``sparsity``: share of zeros in every convolution and fully-connected weight, or "seed" for the published share of
    each layer. ``keep_first`` leaves the first layer dense, ``pattern`` ("4x1") prunes blocks of output channels. The
    same arguments give the same model. Layers are named after their weights. Raises InvalidOption for arguments that
    make no sense.
    """
    shares, rows = _options(name, sparsity, batch, pattern)
    if name in NAMES:
        return light.build(name, shares, rows=rows, keep_first=keep_first, seed=seed, batch=batch)
    assert isinstance(shares, float)  # there are no tables of transformers
    encoder = TRANSFORMERS[name]
    return transformer.build(encoder, shares, rows=rows, keep_first=keep_first, seed=seed, batch=batch)


def weights(model: Any) -> dict[str, np.ndarray]:
    """Weight of every convolution and fully-connected layer of a built model, output first, by layer name."""
    tensors = {t.name: t for t in model.graph.initializer}
    source = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Reshape" and n.input[0] in tensors}
    result = {}
    for node in model.graph.node:
        weight = source.get(node.input[1], node.input[1]) if len(node.input) > 1 else ""
        if node.op_type in ("Conv", "Gemm"):
            result[node.name] = numpy_helper.to_array(tensors[weight])
        elif node.op_type == "MatMul" and weight in tensors:  # stored [inputs, outputs]
            result[node.name] = numpy_helper.to_array(tensors[weight]).T
    return result
