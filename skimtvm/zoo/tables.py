"""Published sparsity of each layer of pruned models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import InvalidOption

_TABLE_OF = {"alexnet": "caffenet"}


def has_table(name: str) -> bool:
    """Whether sparsity "seed" means something for the network ``name``."""
    return _TABLE_OF.get(name, name) in _tables()


def _tables() -> dict[str, Any]:
    file = Path(__file__).parent.parent / "data" / "seed_sparsity.json"
    tables: dict[str, Any] = json.loads(file.read_text())["networks"]
    return tables


def seed_table(name: str) -> dict[str, float]:
    """Sparsity (0..1) of each pruned layer of a published model, by weight tensor of the ONNX graph.

    Raises InvalidOption for a network without a table.
    """
    tables = _tables()
    key = _TABLE_OF.get(name, name)
    if key not in tables:
        raise InvalidOption(
            f"sparsity 'seed': network '{name}' has no table; choose one of {', '.join(sorted(tables))}"
        )
    return {weight_of(key, layer): percent / 100 for layer, percent in tables[key]["layers"].items()}


def weight_of(network: str, layer: str) -> str:
    """Weight tensor in the ONNX graph of ``network`` of a layer of the published model."""
    if network != "resnet50":
        return f"{layer}_w_0"
    match = re.fullmatch(r"(res\d)([a-z])_(branch\w+)", layer)
    if match is None:  # fc1000
        return "gpu_0/pred_w_0"
    return f"gpu_0/{match[1]}_{ord(match[2]) - ord('a')}_{match[3]}_w_0"
