"""SGD with momentum in the order of operations of SkimCaffe's solver, vectorised and in place.

One step: clip all gradients together, divide by ``iter_size``, add the regularizer's gradient, momentum
(h <- mu h + eta (g + reg)), update (W <- W - mask * h), threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import InvalidOption
from .pruner import Array, Pruner, State
from .regularizers import Regularizer
from .rules import Rule
from .schedules import Schedule, at


class SGD:
    """Trains ``parameters`` (name -> float array, changed in place) with ``rules`` (see Rule).

    ``lr``: a number or a Schedule over steps. ``clip``: largest L2 norm of all gradients together, None for no limit.
    ``iter_size``: how many backward passes were summed into the gradients. Raises InvalidOption.
    """

    def __init__(
        self,
        parameters: Mapping[str, Array],
        rules: Mapping[str, Rule | Regularizer] | None = None,
        *,
        lr: float | Schedule,
        momentum: float = 0.9,
        clip: float | None = None,
        iter_size: int = 1,
    ) -> None:
        rate = lr.value if isinstance(lr, Schedule) else lr
        if not (math.isfinite(rate) and rate >= 0 and 0 <= momentum < 1):
            raise InvalidOption(
                f"solver: lr {rate}, momentum {momentum}: give lr from 0 and momentum from 0 to below 1"
            )
        if iter_size < 1 or (clip is not None and not clip > 0):
            raise InvalidOption(f"solver: iter_size {iter_size}, clip {clip}: give iter_size from 1 and clip above 0")
        self.pruner = Pruner(parameters, rules or {})
        self.lr, self.momentum, self.clip, self.iter_size = lr, momentum, clip, iter_size
        self.history = {name: np.zeros_like(w) for name, w in self.parameters.items()}
        self._scratch = {name: np.empty_like(w) for name, w in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, Array]:
        return self.pruner.parameters

    @property
    def steps(self) -> int:
        return self.pruner.step

    def step(self, gradients: Mapping[str, Array]) -> None:
        """One step with the gradients of the loss (not changed). Parameters without a gradient stay as they are.

        Raises TrainingDiverged, before anything is changed, if a gradient is not finite.
        """
        for name, g in gradients.items():
            w = self.parameters.get(name)
            if w is None or w.shape != g.shape:
                expected = "no such parameter" if w is None else f"the parameter has shape {w.shape}"
                raise InvalidOption(f"gradient '{name}' of shape {g.shape}: {expected}")
        self.pruner.check(gradients)
        rate = at(self.lr, self.steps)
        factor = self._clip_factor(gradients) / self.iter_size
        for name, g in gradients.items():
            w, h, d = self.parameters[name], self.history[name], self._scratch[name]
            layer = self.pruner.layers.get(name)
            np.copyto(d, g)
            if factor != 1:
                d *= d.dtype.type(factor)
            self.pruner.remember(name, d)
            extra = self.pruner.regularization(name)
            if extra is not None:
                d += extra
            d *= np.asarray(rate if layer is None else rate * layer.rule.lr_mult, dtype=d.dtype)
            h *= h.dtype.type(self.momentum)
            h += d
            if layer is not None and layer.drop is not None:
                np.copyto(d, h)
                np.copyto(d, 0, where=layer.drop)
                w -= d
            else:
                w -= h
        self.pruner.after_update(rate, {name: self.history[name] for name in gradients})

    def _clip_factor(self, gradients: Mapping[str, Array]) -> float:
        if self.clip is None:
            return 1.0
        norm = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in gradients.values()))
        return self.clip / norm if norm > self.clip else 1.0

    def state_dict(self) -> State:
        """Copies of all state but the parameters; continuing from it is bit for bit the same."""
        out = {f"pruner/{k}": v for k, v in self.pruner.state_dict().items()}
        out |= {f"history/{name}": h.copy() for name, h in self.history.items()}
        return out

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Raises InvalidOption if the state is of other parameters or rules."""
        for name, h in self.history.items():
            saved = state.get(f"history/{name}")
            if saved is None or saved.shape != h.shape:
                raise InvalidOption(f"the saved state does not fit parameter '{name}' of shape {h.shape}")
        self.pruner.load_state_dict({k.removeprefix("pruner/"): v for k, v in state.items() if k.startswith("pruner/")})
        for name, h in self.history.items():
            np.copyto(h, state[f"history/{name}"])
