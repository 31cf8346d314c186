"""Relax passes of the compiler; ``simplify_passes`` is the first phase."""

from __future__ import annotations

from .simplify import simplify_passes

__all__ = ["simplify_passes"]
