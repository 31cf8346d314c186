"""How a network or layer is pruned: the text of ``--sparsity``, what it means, and where the figure comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import zoo
from ..errors import InvalidOption


@dataclass(frozen=True)
class Sparsity:
    """``kind``: none, seed, uniform, block or winograd; ``share``: of zeros; ``rows`` of a block."""

    kind: str
    share: float = 0.0
    rows: int = 1

    @staticmethod
    def parse(text: str) -> Sparsity:
        """``none``, ``seed``, ``0.9``, ``block4:0.9`` or ``winograd:0.9``. Raises InvalidOption."""
        if text in ("none", "seed"):
            return Sparsity(text)
        if text.startswith("winograd:") and (match := re.fullmatch(r"0?\.\d+", text[9:])):
            return Sparsity("winograd", float(match[0]))
        match = re.fullmatch(r"(?:block(\d+):)?(0?\.\d+|0)", text)
        if match is None:
            raise InvalidOption(
                f"sparsity '{text}' is unknown; give seed, none, a share as 0.9, block4:0.9 or winograd:0.9"
            )
        share = float(match[2])
        if match[1] is None:
            return Sparsity("uniform", share) if share else Sparsity("none")
        rows = int(match[1])
        zoo.parse_pattern(f"{rows}x1")
        return Sparsity("block", share, rows)

    def __str__(self) -> str:
        named = {"block": f"block{self.rows}:", "winograd": "winograd:", "uniform": ""}
        return f"{named[self.kind]}{self.share:g}" if self.kind in named else self.kind

    @property
    def source(self) -> str:
        """Where the sparsity comes from, for the record."""
        random = "random weights of the built-in zoo"
        return {
            "none": f"{random}, not pruned",
            "seed": f"{random}, pruned by magnitude to each layer's sparsity in SkimCaffe's published models",
            "uniform": f"{random}, the smallest {self.share:.4g} of every layer with weights set to zero",
            "block": f"{random}, {self.rows}x1 blocks (output channels) of least norm set to zero, {self.share:.4g} of "
            "every layer but the first, which is dense",
            "winograd": f"{random}, every layer with {self.share:.4g} zeros: 3x3 and 5x5 convolutions of stride 1 in the "
            "Winograd domain, where they have 4 and 2.6 times as many weights, others as they are",
        }[self.kind]

    @property
    def unstructured(self) -> Sparsity:
        """The same share without blocks."""
        return Sparsity("uniform", self.share)

    def check(self, network: str) -> None:
        """Raises InvalidOption if the zoo's ``network`` cannot be pruned so."""
        if self.kind == "seed":
            zoo.seed_table(network)
        if self.kind == "winograd" and network in zoo.TRANSFORMERS:
            raise InvalidOption(f"sparsity '{self}': network '{network}' has no convolutions; give a share as 0.9")

    def build(self, network: str, *, batch: int = 1) -> Any:
        """The zoo's ``network`` as onnx.ModelProto. Raises InvalidOption as ``check`` does."""
        self.check(network)
        if self.kind == "winograd":
            from .native_models import to_native

            return to_native(zoo.build(network, batch=batch), self.share, self.share)
        if self.kind == "block":
            return zoo.build(network, sparsity=self.share, batch=batch, pattern=f"{self.rows}x1", keep_first=True)
        value = {"none": None, "seed": "seed"}.get(self.kind, self.share)
        return zoo.build(network, sparsity=value, batch=batch)

    def prune(self, weight: np.ndarray, groups: int = 1) -> np.ndarray:
        """``weight`` of one layer, output channels first."""
        if self.kind == "seed":
            raise InvalidOption("sparsity 'seed' belongs to networks; give layers a share as 0.9, or block4:0.9")
        if self.kind == "winograd":
            raise InvalidOption("sparsity 'winograd:...' belongs to networks; layers have Winograd cases of their own")
        return zoo.prune(weight, self.share, rows=self.rows, groups=groups) if self.share else weight
