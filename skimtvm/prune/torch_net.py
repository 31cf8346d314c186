"""The networks of train-demo in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import torch as adaptor
from .nets import EPSILON, Conv, Spec, shapes
from .torch import nn, torch

Array = npt.NDArray[Any]


class _Module(nn.Module):
    def __init__(self, spec: Spec, image: tuple[int, int, int]) -> None:
        super().__init__()
        self.spec = spec
        for layer, shape in shapes(spec, image):
            if isinstance(layer, Conv):
                self.add_module(layer.name, nn.Conv2d(shape[1], layer.k, layer.r, padding=layer.r // 2, bias=False))
                self.add_module(f"{layer.name}_bn", nn.BatchNorm2d(layer.k, eps=EPSILON))
            else:
                self.add_module(layer.name, nn.Linear(shape[1], layer.k))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.spec:
            if isinstance(layer, Conv):
                x = self.get_submodule(f"{layer.name}_bn")(self.get_submodule(layer.name)(x))
                # The maximum and ReLU commute exactly, and this order has a quarter of the work.
                x = nn.functional.relu(nn.functional.max_pool2d(x, 2) if layer.pool else x)
            else:
                x = self.get_submodule(layer.name)(x.flatten(1))
                x = x if layer is self.spec[-1] else nn.functional.relu(x)
        return x


class TorchNet:
    """Has the same methods as nets.NumpyNet."""

    def __init__(self, spec: Spec, image: tuple[int, int, int], seed: int, threads: int) -> None:
        torch.set_num_threads(threads)  # sums are taken in an order that depends on it
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(seed)
        self.spec, self.image = spec, image
        self.module = _Module(spec, image)
        self.parameters: dict[str, Array] = adaptor.arrays(self.module)

    def logits(self, x: Array) -> Array:
        self.module.eval()
        with torch.no_grad():
            parts = [self.module(torch.from_numpy(x[i : i + 500])).numpy() for i in range(0, len(x), 500)]
        self.module.train()
        return np.concatenate(parts)

    def gradients(self, x: Array, labels: Array) -> tuple[float, dict[str, Array]]:
        self.module.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.module(torch.from_numpy(x)), torch.from_numpy(labels))
        loss.backward()
        return float(loss.detach()), adaptor.gradients(self.module)

    def state(self) -> dict[str, Array]:
        buffers = {n: b.numpy() for n, b in self.module.named_buffers() if n.endswith(("running_mean", "running_var"))}
        return self.parameters | buffers

    def input_of(self, name: str, x: Array) -> Array:
        """What the layer ``name`` gets for the images ``x``."""
        parts: list[torch.Tensor] = []
        handle = self.module.get_submodule(name).register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0]))
        try:
            self.logits(x)
        finally:
            handle.remove()
        return np.asarray(torch.cat(parts).numpy())

    def to_winograd(self) -> None:
        """Every convolution but the first gets Winograd-domain weights."""
        names = [layer.name for layer in self.spec if isinstance(layer, Conv)][1:]
        for name in names:
            adaptor.to_winograd(self.module, name)
        self.parameters = adaptor.arrays(self.module)
