"""The PyTorch adaptor: parameters stay PyTorch's, the package works on the same memory through NumPy.

Three lines in an existing loop, with any optimizer:

    pruner = Pruner(model, {"features.*": Rule(L1(1e-5), GradientAdjusted())}, optimizer)
    ...
        loss.backward()
        pruner.after_backward()
        optimizer.step()
        pruner.after_step()
    torch.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, path)

``SGD`` is the solver of this package as an optimizer; ``WinogradConv2d`` the layer with Winograd-domain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EnvironmentProblem, InvalidOption
from ..winograd import Transform, of_tile
from . import pruner as core
from . import solver
from .regularizers import Regularizer
from .rules import Rule, matching
from .schedules import Schedule

try:
    import torch
    from torch import nn
    from torch.autograd.function import once_differentiable
except ImportError:
    raise EnvironmentProblem(
        "skimtvm.prune.torch needs PyTorch; install its CPU build with: pip install torch==2.13.0"
    ) from None

Array = npt.NDArray[Any]
_CACHED = 1 << 19  # numbers of the largest intermediate value of a part of a batch


def arrays(model: nn.Module) -> dict[str, Array]:
    """Every trainable parameter as a NumPy array that shares its memory. Raises InvalidOption where it cannot."""
    return {name: _array(name, p) for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Array]:
    """The gradients as NumPy arrays that share their memory; parameters without one are left out."""
    found = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return {name: _array(name, g) for name, g in found if g is not None}


def _array(name: str, tensor: torch.Tensor) -> Array:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InvalidOption(f"parameter '{name}' is not a dense tensor on the CPU; move the model with model.cpu()")
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16):
        raise InvalidOption(f"parameter '{name}' is {tensor.dtype}, which NumPy lacks; use float32 (model.float())")
    return np.asarray(tensor.detach().numpy())


def _plain(state: Mapping[str, Any]) -> dict[str, Array]:
    return {k: v.numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in state.items()}


def _tensors(state: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.array(v)) for k, v in state.items()}  # what torch.load takes with weights_only


class Pruner:
    """Rules for the layers of ``model``, around the step of any ``optimizer`` (only its learning rate is read)."""

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule | Regularizer],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.core = core.Pruner(arrays(model), rules)
        for name, layer in self.core.layers.items():
            if np.ndim(layer.rule.lr_mult) or layer.rule.lr_mult != 1:
                raise InvalidOption(f"layer '{name}': lr_mult needs SGD of this package; use a parameter group instead")
            if layer.rule.regularizer is not None and layer.rule.regularizer.proximal and optimizer is None:
                raise InvalidOption(f"layer '{name}': ISTA shrinks by the learning rate; pass the optimizer")

    def after_backward(self) -> None:
        """Check the gradients (TrainingDiverged names the layer) and add the regularizers' to them."""
        self._refresh()
        self.core.before_update(gradients(self.model))

    def after_step(self) -> None:
        """Threshold and mask."""
        self._refresh()
        self.core.after_update(0.0 if self.optimizer is None else self._rates(self.optimizer))

    def _rates(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """The learning rate of each parameter, 0 for those that the optimizer does not have."""
        of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        return {name: of.get(id(p), 0.0) for name, p in self.model.named_parameters()}

    def sparsity(self) -> dict[str, float]:
        return self.core.sparsity()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return _tensors(self.core.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.core.load_state_dict(_plain(state))

    def _refresh(self) -> None:
        """Follow parameters whose memory was replaced (``param.data = ...``)."""
        self.core.parameters.update(arrays(self.model))


class SGD:
    """``skimtvm.prune.SGD`` on the parameters of ``model``; see there for the options."""

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule | Regularizer] | None = None,
        *,
        lr: float | Schedule,
        momentum: float = 0.9,
        clip: float | None = None,
        iter_size: int = 1,
    ) -> None:
        self.model = model
        self.core = solver.SGD(arrays(model), rules, lr=lr, momentum=momentum, clip=clip, iter_size=iter_size)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.core.parameters.update(arrays(self.model))
        self.core.step(gradients(self.model))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return _tensors(self.core.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.core.load_state_dict(_plain(state))


class _WholeTiles(torch.autograd.Function):
    """x[N, C, H, W], u[t * t, C, K] -> whole output tiles [N, K, th * m, tw * m].

    Channels are innermost in all it computes, so that gathering and scattering tiles moves whole rows; the backward keeps
    the transformed input instead of what autograd would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        u: torch.Tensor,
        input_matrix: torch.Tensor,
        output_matrix: torch.Tensor,
        f: Transform,
        place: tuple[int, int, int, int],
    ) -> torch.Tensor:
        (n, c, h, w), (top, left, th, tw) = x.shape, place
        m, t, k = f.m, f.tile, u.shape[2]
        padded = x.new_zeros(n, th * m + f.r - 1, tw * m + f.r - 1, c)
        padded[:, top : top + h, left : left + w] = x.permute(0, 2, 3, 1)
        sn, sh, sw, sc = padded.stride()
        d = padded.as_strided((t, t, n, th, tw, c), (sh, sw, sn, m * sh, m * sw, sc)).reshape(t * t, -1)
        v = (input_matrix @ d).view(t * t, -1, c)
        y = (output_matrix @ torch.bmm(v, u).view(t * t, -1)).view(m, m, n, th, tw, k)
        ctx.save_for_backward(v, u, input_matrix, output_matrix)
        ctx.f, ctx.place, ctx.shape = f, place, x.shape
        return y.permute(2, 3, 0, 4, 1, 5).reshape(n, th * m, tw * m, k).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        v, u, input_matrix, output_matrix = ctx.saved_tensors
        (n, c, h, w), (top, left, th, tw) = ctx.shape, ctx.place
        m, t, k = ctx.f.m, ctx.f.tile, u.shape[2]
        g = dy.permute(0, 2, 3, 1).reshape(n, th, m, tw, m, k).permute(2, 4, 0, 1, 3, 5).reshape(m * m, -1)
        dm = (output_matrix.T @ g).view(t * t, -1, k)
        du = torch.bmm(v.transpose(1, 2), dm)
        if not ctx.needs_input_grad[0]:
            return None, du, None, None, None, None
        dd = (input_matrix.T @ torch.bmm(dm, u.transpose(1, 2)).view(t * t, -1)).view(t, t, n, th, tw, c)
        padded = dy.new_zeros(n, (th + 2) * m + ctx.f.r, (tw + 2) * m + ctx.f.r, c)
        for i in range(0, t, m):  # tiles overlap by r - 1, their m x m parts do not
            for j in range(0, t, m):
                part = dd[i : i + m, j : j + m].permute(2, 3, 0, 4, 1, 5)
                blocks = padded[:, i : i + th * m, j : j + tw * m].unflatten(2, (tw, m)).unflatten(1, (th, m))
                blocks[:, :, : part.shape[2], :, : part.shape[4]] += part
        return padded[:, top : top + h, left : left + w].permute(0, 3, 1, 2), du, None, None, None, None


class WinogradConv2d(nn.Module):
    """Stride 1 convolution whose parameter ``weight`` is U[K, C, t, t] in the Winograd domain.

    ``m``, ``r``: F(m x m, r x r), t = m + r - 1. ``padding``: top, left, bottom, right, or one number for all.
    """

    input_matrix: torch.Tensor
    output_matrix: torch.Tensor

    def __init__(
        self,
        c: int,
        k: int,
        r: int = 3,
        m: int = 4,
        padding: int | tuple[int, int, int, int] = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.f = of_tile(m + r - 1, r)
        self.padding = (padding,) * 4 if isinstance(padding, int) else padding
        spatial = nn.Conv2d(c, k, r).weight.detach().numpy()  # PyTorch's own initialisation, transformed
        self.weight = nn.Parameter(torch.from_numpy(self.f.forward(spatial)))
        self.bias = nn.Parameter(torch.zeros(k)) if bias else None
        for name, matrix in (("input_matrix", self.f.input_matrix), ("output_matrix", self.f.output_matrix)):
            self.register_buffer(name, torch.from_numpy(matrix.astype(np.float32)), persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, m: int = 4) -> WinogradConv2d:
        """The layer that computes what ``conv`` does. Raises InvalidOption unless it has stride 1 and no groups."""
        r, square = conv.kernel_size[0], conv.kernel_size[0] == conv.kernel_size[1]
        if not square or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
            raise InvalidOption(f"winograd: {conv} needs a square filter, stride 1, no dilation and no groups")
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise InvalidOption(f"winograd: {conv} needs zero padding given by numbers")
        y, x = conv.padding
        out = cls(conv.in_channels, conv.out_channels, r, m, (y, x, y, x), conv.bias is not None)
        with torch.no_grad():
            out.weight.copy_(torch.from_numpy(out.f.forward(conv.weight.detach().numpy())))
            if conv.bias is not None and out.bias is not None:
                out.bias.copy_(conv.bias)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f, (top, left, bottom, right) = self.f, self.padding
        c, h, w = x.shape[1:]
        k, tt = self.weight.shape[0], f.tile**2
        out_h, out_w = h + top + bottom - f.r + 1, w + left + right - f.r + 1
        th, tw = -(-out_h // f.m), -(-out_w // f.m)
        u = self.weight.reshape(k, c, tt).permute(2, 1, 0).contiguous()
        matrices = self.input_matrix.to(x.dtype), self.output_matrix.to(x.dtype)
        # The transforms do little with each byte: in parts that stay in the cache they are several times as fast.
        count = max(_CACHED // (max(k, c) * tt * th * tw), 1)
        parts = [_WholeTiles.apply(p, u, *matrices, f, (top, left, th, tw)) for p in x.split(count)]
        y = (torch.cat(parts) if len(parts) > 1 else parts[0])[:, :, :out_h, :out_w]
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        k, c = self.weight.shape[:2]
        return f"{c}, {k}, F({self.f.m}x{self.f.m},{self.f.r}x{self.f.r}), padding={self.padding}"


def to_winograd(model: nn.Module, pattern: str, m: int = 4) -> list[str]:
    """Replace the convolutions that ``pattern`` (fnmatch on module names) matches; returns their names.

    Raises InvalidOption if it matches no convolution, or one that Winograd cannot do.
    """
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    names = matching(convolutions, pattern, what="convolution")
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, WinogradConv2d.from_conv(convolutions[name], m))
    return names
