"""The two halves of pruning that go around any optimizer's step: before it, and after it.

Arrays are the training loop's own: everything happens in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption, SkimError
from . import schedules
from .masks import Mask, checked
from .regularizers import Regularizer
from .rules import Rule, assign, layer_name

Array = npt.NDArray[Any]
State = dict[str, Array]


class TrainingDiverged(SkimError):
    """A gradient is NaN or infinite: nothing of that step was applied."""

    exit_code = 9


class _Layer:
    """What is remembered about one weight that has a rule."""

    def __init__(self, name: str, w: Array, rule: Rule) -> None:
        self.name, self.rule = name, rule
        self.copy: Array | None = None
        self.drop: npt.NDArray[np.bool_] | None = None  # the complement of the mask
        self.gradient: Array | None = None  # of the loss alone
        self.before: Array | None = None  # the weights before the step, where the update is asked for
        self.frozen = False  # the mask grows no more
        self.off = False  # the rule is suspended
        if rule.regularizer is not None and rule.regularizer.copies:
            self.copy = w.copy()
        if isinstance(rule.mask, Mask):
            if rule.sparsity is None:
                self.drop = ~rule.mask.keep(w)
        elif rule.mask is not None:
            self.drop = ~checked(rule.mask, w, layer_name(name))

    @property
    def reading(self) -> str:
        return "" if self.rule.threshold is None else self.rule.threshold.reading


class Pruner:
    """Regularizes, thresholds and masks the ``parameters`` (name -> array, changed in place) that ``rules`` name.

    ``rules``: fnmatch pattern of layer names -> Rule (a Regularizer alone stands for a Rule with it), the first that fits
    wins. Call ``before_update`` when the
    gradients are there, then any optimizer's step, then ``after_update``. Raises InvalidOption for a pattern without a
    layer, or a mask of the wrong shape.
    """

    def __init__(self, parameters: Mapping[str, Array], rules: Mapping[str, Rule | Regularizer]) -> None:
        for name, w in parameters.items():
            if not isinstance(w, np.ndarray) or w.dtype.kind != "f":
                raise InvalidOption(f"parameter '{name}' is no floating-point array; leave it out")
            if not w.flags.writeable:
                raise InvalidOption(f"parameter '{name}' is read-only; pass a copy")
        self.parameters = dict(parameters)
        whole = {p: Rule(r) if isinstance(r, Regularizer) else r for p, r in rules.items()}
        self.layers = {n: _Layer(n, self.parameters[n], rule) for n, rule in assign(self.parameters, whole).items()}
        self.step = 0
        for name in self.layers:
            self._mask(name)

    # ---- around a step -----------------------------------------------------------------------------------------------

    def check(self, gradients: Mapping[str, Array]) -> None:
        """Raise TrainingDiverged, naming the layer, if a gradient is not finite."""
        for name, g in gradients.items():
            with np.errstate(all="ignore"):
                total = float(g.sum())  # NaN and inf survive a sum; finite numbers may only overflow
            if not math.isfinite(total) and not np.isfinite(g).all():
                bad = g.size - int(np.count_nonzero(np.isfinite(g)))
                raise TrainingDiverged(
                    f"layer '{layer_name(name)}': {bad} of {g.size} gradients are NaN or infinite at step {self.step}; "
                    "nothing was applied; lower the learning rate or the decay and go on from the last checkpoint"
                )

    def regularization(self, name: str) -> Array | None:
        """The penalty's gradient at the present weights, None where there is none to add."""
        layer = self.layers.get(name)
        if layer is None or layer.off or layer.rule.regularizer is None or layer.rule.regularizer.proximal:
            return None
        factor = schedules.at(layer.rule.decay_factor, self.step)
        return layer.rule.regularizer.scaled(factor).gradient(self.parameters[name])

    def before_update(self, gradients: Mapping[str, Array]) -> None:
        """Check the gradients of the loss, remember what thresholds need, and add the regularizers' to them in place."""
        self.check(gradients)
        for name, layer in self.layers.items():
            if name not in gradients or layer.off:
                continue
            self.remember(name, gradients[name])
            if layer.reading == "update" or layer.copy is not None:
                layer.before = _copy_into(layer.before, self.parameters[name])
            extra = self.regularization(name)
            if extra is not None:
                np.add(gradients[name], extra, out=gradients[name])

    def remember(self, name: str, gradient: Array) -> None:
        """Keep the gradient of the loss for a threshold that is adjusted by it."""
        layer = self.layers.get(name)
        if layer is not None and layer.reading == "gradient":
            layer.gradient = _copy_into(layer.gradient, gradient)

    def after_update(self, lr: float | Mapping[str, float], updates: Mapping[str, Array] | None = None) -> None:
        """Shrink, threshold and mask. ``lr``: the learning rate, or one for each parameter; ``updates``: what was
        subtracted, by default the difference of the weights."""
        for name, layer in self.layers.items():
            if layer.off:
                continue
            w, rule = self.parameters[name], layer.rule
            update = None if updates is None else updates.get(name)
            if update is None and layer.before is not None:
                update = layer.before - w
            if layer.copy is not None and update is not None:
                layer.copy -= update
            if rule.regularizer is not None and rule.regularizer.proximal:
                factor = schedules.at(rule.decay_factor, self.step)
                rate = lr[name] if isinstance(lr, Mapping) else lr
                rule.regularizer.scaled(factor).shrink(w, rate * rule.lr_mult)  # type: ignore[attr-defined]
            if rule.threshold is not None:
                d = {"gradient": layer.gradient, "update": update}.get(layer.reading)
                if layer.reading == "" or d is not None:
                    rule.threshold.apply(w, d, source=layer.copy)
        self.step += 1
        for name in self.layers:
            self._mask(name)

    def _mask(self, name: str) -> None:
        layer, w = self.layers[name], self.parameters[name]
        if layer.off:
            return
        rule = layer.rule
        if rule.sparsity is not None and not layer.frozen and self.step % rule.every == 0:
            target = schedules.at(rule.sparsity, self.step)
            if target > 0:
                mask = rule.mask if isinstance(rule.mask, Mask) else Mask()
                layer.drop = ~mask.keep(w, target)
        if layer.drop is not None:
            np.copyto(w, 0, where=layer.drop)
            if layer.copy is not None:
                np.copyto(layer.copy, 0, where=layer.drop)

    # ---- what guided pruning and users change on the way ---------------------------------------------------------------

    def mask_of(self, name: str) -> npt.NDArray[np.bool_] | None:
        """True where weights live; None for a layer without mask."""
        layer = self.layers.get(name)
        return None if layer is None or layer.drop is None else ~layer.drop

    def freeze(self, name: str) -> None:
        """From now on the zeros of the layer stay, and no others come: its regularizer and threshold stop."""
        layer = self._known(name)
        layer.drop, layer.frozen = self.parameters[name] == 0, True
        layer.rule = Rule(mask=~layer.drop, lr_mult=layer.rule.lr_mult)
        layer.copy = None

    def release(self, name: str, weights: Array | None = None, rule: Rule | None = None) -> None:
        """End the layer's rule, or put ``rule`` in its place; with ``weights`` also put those back."""
        layer = self._known(name)
        layer.off, layer.frozen, layer.drop, layer.copy, layer.before = rule is None, False, None, None, None
        layer.rule = layer.rule if rule is None else rule
        if weights is not None:
            np.copyto(self.parameters[name], weights)

    def _known(self, name: str) -> _Layer:
        if name not in self.layers:
            raise InvalidOption(f"layer '{name}' has no rule; those with one are {', '.join(self.layers) or 'none'}")
        return self.layers[name]

    def penalty(self) -> float:
        """Sum of all penalties at the present weights."""
        terms = (
            (layer.rule.regularizer.scaled(schedules.at(layer.rule.decay_factor, self.step)), self.parameters[n])
            for n, layer in self.layers.items()
            if layer.rule.regularizer is not None and not layer.off
        )
        return sum(regularizer.penalty(w) for regularizer, w in terms)

    def sparsity(self) -> dict[str, float]:
        """Share of zeros of every weight (two dimensions or more), by layer name."""
        return {layer_name(n): zeros(w) for n, w in self.parameters.items() if w.ndim >= 2}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Copies of everything that is not in the parameters; ``load_state_dict`` continues bit for bit."""
        out: State = {"step": np.array(self.step)}
        for name, layer in self.layers.items():
            out[f"flags/{name}"] = np.array([layer.frozen, layer.off])
            if layer.drop is not None:
                out[f"drop/{name}"] = np.packbits(layer.drop)
            if layer.copy is not None:
                out[f"copy/{name}"] = layer.copy.copy()
        return out

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Raises InvalidOption if the state is of other layers."""
        expected = {k.removeprefix("flags/") for k in state if k.startswith("flags/")}
        if expected != set(self.layers):
            odd = ", ".join(sorted(expected ^ set(self.layers)))
            raise InvalidOption(f"the saved state is of other layers or rules (differing: {odd}); build the same ones")
        self.step = int(state["step"])
        for name, layer in self.layers.items():
            w = self.parameters[name]
            layer.frozen, layer.off = (bool(v) for v in state[f"flags/{name}"])
            packed, copy = state.get(f"drop/{name}"), state.get(f"copy/{name}")
            if packed is not None and packed.size != (w.size + 7) // 8:
                raise InvalidOption(f"layer '{name}': the saved mask is of another shape than {w.shape}")
            layer.drop = None if packed is None else np.unpackbits(packed, count=w.size).astype(bool).reshape(w.shape)
            layer.copy = None if copy is None else _copy_into(layer.copy, copy)
            if layer.frozen and layer.drop is not None:
                layer.rule = Rule(mask=~layer.drop, lr_mult=layer.rule.lr_mult)


def zeros(w: Array) -> float:
    """Share of exact zeros."""
    return 1 - int(np.count_nonzero(w)) / w.size if w.size else 0.0


def _copy_into(buffer: Array | None, source: Array) -> Array:
    if buffer is None or buffer.shape != source.shape:
        return source.copy()
    np.copyto(buffer, source)
    return buffer
