"""The phases of a training run: rules and solver of each, epochs, checkpoints. See demo."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..winograd import of_tile
from . import datasets
from .groups import Blocks
from .guide import Guide, GuidedPruning
from .masks import Mask, smallest
from .native import WinogradConv2d, balanced_rates
from .nets import Conv, NumpyNet, network, workloads
from .pruner import zeros
from .regularizers import ISTA, L1, L2, GroupLasso, L1Surgery
from .rules import Rule, layer_name
from .rundir import Config, RunDir
from .schedules import Cosine, Schedule, ramp_to_sparsity
from .solver import SGD
from .steering import Dial, Steering
from .surgeon import output_moments, prune_rows
from .thresholds import GradientAdjusted

Array = npt.NDArray[Any]
PHASES = ("dense", "prune", "tune")
_CHECKPOINT_SECONDS = 30.0
_SAMPLE = 2000  # images over which the winograd method compares outputs
_SHRINK = 0.06  # about the largest of the weights that should go; initial weights have a deviation of 0.02 to 0.05


class Run:
    """State of a run and what each phase does with it; ``demo.train`` calls it."""

    def __init__(self, config: Config, folder: RunDir, data: datasets.Dataset) -> None:
        self.config, self.folder, self.data = config, folder, data
        spec = network(config.network)
        if spec[-1].k < data.classes:
            raise InvalidOption(f"network '{config.network}' has {spec[-1].k} outputs, the data {data.classes} classes")
        if config.batch > len(data.images):
            raise InvalidOption(
                f"batch is {config.batch}, but there are only {len(data.images)} images; use a smaller one"
            )
        self.spec = spec
        self.net: Any
        if config.solver == "numpy":
            self.net = NumpyNet(spec, data.image, config.seed)
        else:
            from .torch_net import TorchNet

            self.net = TorchNet(spec, data.image, config.seed, config.threads)
        self.first = layer_name(f"{spec[0].name}.weight") if isinstance(spec[0], Conv) else ""
        self.batches = len(data.images) // config.batch
        self.phase, self.epoch, self.batch, self.loss = 0, 0, 0, 0.0
        self.dense_accuracy, self.seconds = 0.0, 0.0
        self.native = False
        self.sgd: SGD
        self.steering: Steering | None = None
        self.guide = None if config.guide is None else self._guide()
        self.guided: GuidedPruning | None = None
        self.decisions: dict[str, str] = {}

    # ---- phases --------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Array]:
        return {n: w for n, w in self.net.parameters.items() if w.ndim >= 2}

    def pruned(self) -> dict[str, Array]:
        """The weights that the method prunes: all but the first convolution; for winograd the Winograd layers; if it is
        guided the layers that are worth it."""
        chosen = {n: w for n, w in self.weights().items() if layer_name(n) != self.first}
        if self.guide is not None:
            chosen = {n: w for n, w in chosen.items() if self._worth(layer_name(n))}
        if self.config.method == "winograd":
            chosen = {n: w for n, w in chosen.items() if w.ndim == 4}
        return chosen

    def _guide(self) -> Guide:
        c, works = self.config, workloads(self.spec, self.data.image)
        works.pop(self.first, None)
        kernel = f"bsr{c.block}" if c.method == "group" and c.block > 1 else "csr"
        guide = Guide(works, c.guide or None, kernel=kernel, reach=1 - c.sparsity)
        if not any(p.worth for p in guide.plan().values()):
            raise InvalidOption("guided pruning: no layer would be faster at this sparsity; train without guide")
        return guide

    def _worth(self, layer: str) -> bool:
        """Whether a layer is pruned: not left dense, and not restored."""
        assert self.guide is not None
        return self.guide.project(layer).worth and not self.decisions.get(layer, "").startswith("restored")

    def filter_size(self, name: str) -> int:
        return next((x.r for x in self.spec if isinstance(x, Conv) and x.name == layer_name(name)), 0)

    def rates(self, name: str) -> Any:
        """Learning-rate factor of a weight: positions of the Winograd domain have very different scales."""
        if not self.native or name not in self.pruned():
            return 1.0
        w = self.net.parameters[name]
        return balanced_rates(of_tile(w.shape[-1], self.filter_size(name)))

    def _decay(self, steps: int) -> float:
        """The strength with which the penalty alone would take a weight of _SHRINK to zero in this phase.

        Each step moves a weight by lr * decay, momentum makes that 1 / (1 - momentum) times as much.
        """
        c = self.config
        return _SHRINK * (1 - c.momentum) / (c.prune_lr * max(steps, 1)) if c.decay is None else c.decay

    def _pruning_rule(self, name: str, steps: int) -> Rule:
        c = self.config
        decay = self._decay(steps)
        aim = self._target() if self.guide is None else self._aim(name)
        target = ramp_to_sparsity(aim, begin=0, end=max(steps * 3 // 4, 1))
        adjusted = GradientAdjusted(c.threshold, factor=c.factor)
        if c.method == "l1":
            return Rule(L1(decay), adjusted)
        if c.method == "surgery":
            return Rule(L1Surgery(decay), adjusted)
        if c.method == "ista":
            return Rule(ISTA(decay))
        if c.method == "group":
            blocks = Blocks(c.block)
            return Rule(GroupLasso(decay, blocks, by_size=True), GradientAdjusted(c.threshold, blocks, c.factor))
        if c.method == "winograd":  # _operate prunes, where an epoch begins
            return Rule(L2(c.l2), mask=Mask(), lr_mult=self.rates(name))
        return Rule(L2(c.l2), mask=Mask(), sparsity=target, every=10)

    def _aim(self, name: str) -> float:
        """Sparsity to which the guide sends a layer."""
        assert self.guide is not None
        return 1 - self.guide.project(layer_name(name)).target

    def _target(self) -> float:
        """Sparsity of the pruned layers that gives the wanted one over all weights, or each layer's own to the guide."""
        if self.config.method == "winograd":
            return self.config.sparsity
        if self.guide is not None:
            chosen = self.pruned()
            return sum(self._aim(n) * w.size for n, w in chosen.items()) / max(sum(w.size for w in chosen.values()), 1)
        total = sum(w.size for w in self.weights().values())
        share = self.config.sparsity * total / sum(w.size for w in self.pruned().values())
        if share >= 1:
            raise InvalidOption(f"sparsity {self.config.sparsity} cannot be reached: the first layer stays dense")
        return share

    def begin_phase(self, *, resumed: bool = False) -> None:
        """Build the solver of this phase. A resumed phase finds its weights in the checkpoint."""
        c, name = self.config, PHASES[self.phase]
        if self.phase and c.method == "winograd" and not self.native:
            self.net.to_winograd()
            self.native = True
        if name == "tune" and not resumed:
            self._reach_target()
        steps = c.epochs[self.phase] * self.batches
        every = {n: Rule(L2(c.l2), lr_mult=self.rates(n)) for n in self.weights()}
        dial = Dial()
        lr: Schedule = Cosine(c.prune_lr, total=max(steps, 1), warmup=min(100, steps // 10))
        if name == "dense":
            lr = Cosine(c.lr, total=max(steps, 1), warmup=min(200, steps // 10))
        elif name == "prune":
            every |= Steering.rules({n: self._pruning_rule(n, steps) for n in self.pruned()}, dial)
            lr = Cosine(c.prune_lr, total=max(steps, 1), low=c.prune_lr / 4)
        else:
            every |= {n: Rule(L2(c.l2), mask=Mask(), lr_mult=self.rates(n)) for n in self.pruned()}
        self.sgd = SGD(self.net.parameters, every, lr=lr, momentum=c.momentum)
        self.guided = None
        if name == "prune" and self.guide is not None:
            self.guided = GuidedPruning(self.sgd.pruner, self.guide, dense=lambda n: Rule(L2(c.l2)))
            self.decisions = dict(self.guided.decisions)
        self.steering = None
        if name == "prune" and c.steer and c.method not in ("dense", "ramp", "winograd"):
            # About 200 corrections, however short the phase: the gain is made for that.
            self.steering = Steering(self.sgd.pruner, [], dial, 0.0, every=max(steps // 200, 1))
            self._steer(steps)

    def _operate(self) -> None:
        """Where an epoch of the pruning phase of the winograd method begins: take the weights that cost the output least,
        as many as the schedule wants at the end of that epoch, layer after layer."""
        c = self.config
        if c.method != "winograd" or PHASES[self.phase] != "prune":
            return
        ramp = ramp_to_sparsity(c.sparsity, begin=0, end=max(c.epochs[1] * 3 // 4, 1))
        wanted = ramp.at(self.epoch + 1)
        if self.sparsities()[1] >= wanted - 1e-4:  # whole weights
            return
        rng = np.random.default_rng([c.seed, 1, self.epoch])
        rows = np.sort(rng.permutation(len(self.data.images))[:_SAMPLE])
        images = datasets.augmented(self.data.images[rows], rng) if c.augment else self.data.images[rows]
        for name, w in self.pruned().items():
            r = self.filter_size(name)
            layer = WinogradConv2d(w, r=r, pads=(r // 2,) * 4)
            moments = output_moments(layer, self.net.input_of(layer_name(name), images))
            flat = w.reshape(len(w), -1)
            np.copyto(flat, prune_rows(flat, moments, wanted))
            self.sgd.pruner.freeze(name)

    def _steer(self, steps: int) -> None:
        """Aim the steering at the layers that are being pruned now."""
        if self.steering is not None:
            # Linear, so that the strength of the penalty changes little; the last fifth is for settling.
            wanted = ramp_to_sparsity(self._target(), begin=0, end=max(steps * 4 // 5, 1), power=1.5)
            self.steering.names, self.steering.wanted = list(self.pruned()), wanted

    def _follow_guide(self) -> None:
        """Every twentieth of the pruning phase: stop layers past their ceiling; in its last fifth restore what is still
        too dense to gain."""
        steps = self.config.epochs[self.phase] * self.batches
        if self.guided is None or self.sgd.steps % max(steps // 20, 1):
            return
        new = self.guided.update(restore=self.sgd.steps > steps * 4 // 5)
        self.decisions |= new
        for layer in new:
            if self.guided.is_dense(layer):
                self.sgd.history[f"{layer}.weight"][...] = 0  # it was gathered on other weights
        if new:
            self._steer(steps)

    def _importance(self, name: str, w: Array) -> Array:
        """Magnitudes that compare within the network: of single weights, or of blocks (one value for each weight)."""
        if self.native:
            f = of_tile(w.shape[-1], self.filter_size(name))
            return np.abs(w) * f.effect.astype(w.dtype)
        if self.config.method == "group":
            blocks = Blocks(self.config.block)
            size = np.sqrt(blocks.sums(w * w) / blocks.sizes(w.shape))
            return np.array(np.broadcast_to(blocks.spread(size, w.shape), w.shape), dtype=w.dtype)
        return np.abs(w)

    def _reach_target(self) -> None:
        """The prune threshold of fine-tuning: 0 where the pruning phase went far enough, otherwise as high as needed."""
        chosen = {
            n: w for n, w in self.pruned().items() if not self.decisions.get(layer_name(n), "").startswith("stop")
        }
        if not chosen or self.config.method == "dense":
            return
        target = self._target()
        sizes = {n: self._importance(n, w) for n, w in chosen.items()}
        if sum(zeros(w) * w.size for w in chosen.values()) >= target * sum(w.size for w in chosen.values()):
            return
        drop = smallest(np.concatenate([s.reshape(-1) for s in sizes.values()]), target)
        start = 0
        for w in chosen.values():
            part = drop[start : start + w.size].reshape(w.shape)
            start += w.size
            if self.config.method == "group":  # a block that ties cut in two goes as a whole
                blocks = Blocks(self.config.block)
                part = blocks.spread(blocks.sums(part.astype(np.float32)) > 0, w.shape)
            np.copyto(w, 0, where=part)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        place = np.array([self.phase, self.epoch, self.batch, self.loss, self.dense_accuracy, self.seconds])
        state = {"place": place} | {f"net/{n}": a for n, a in self.net.state().items()}
        if self.steering is not None:
            state |= self.steering.state_dict()
        if self.guide is not None:
            state["decisions"] = np.array(json.dumps(self.decisions))
        if self.guided is not None:
            state |= self.guided.state_dict()
        self.folder.save(state | {f"sgd/{n}": a for n, a in self.sgd.state_dict().items()})

    def restore(self, state: dict[str, Array]) -> None:
        place = state["place"]
        self.phase, self.epoch, self.batch = (int(v) for v in place[:3])
        self.loss, self.dense_accuracy, self.seconds = (float(v) for v in place[3:])
        if self.phase and self.config.method == "winograd":
            self.net.to_winograd()
            self.native = True
        self.fill({k.removeprefix("net/"): v for k, v in state.items() if k.startswith("net/")})
        if "decisions" in state:
            self.decisions = json.loads(str(state["decisions"]))
        if self.phase < self.config.phases:
            decided = dict(self.decisions)
            self.begin_phase(resumed=True)
            self.sgd.load_state_dict({k.removeprefix("sgd/"): v for k, v in state.items() if k.startswith("sgd/")})
            self.decisions = decided
            if self.guided is not None:
                self.guided.load_state_dict(state)
                self._steer(self.config.epochs[self.phase] * self.batches)
            if self.steering is not None:
                self.steering.load_state_dict(state)

    def fill(self, arrays: dict[str, Array]) -> None:
        live = self.net.state()
        for name, array in live.items():
            if name not in arrays or arrays[name].shape != array.shape:
                raise InvalidOption(f"checkpoint: '{name}' is missing or of another shape; delete it to start again")
            np.copyto(array, arrays[name])

    # ---- training --------------------------------------------------------------------------------------------------------

    def train_epoch(self, tick: Callable[[float], None], checkpoint_every: int | None) -> None:
        c = self.config
        number = sum(c.epochs[: self.phase]) + self.epoch
        order = np.random.default_rng([c.seed, number]).permutation(len(self.data.images))
        began = saved = time.monotonic()
        if self.batch == 0:
            self._operate()
        while self.batch < self.batches:
            rows = np.sort(order[self.batch * c.batch : (self.batch + 1) * c.batch])
            images = self.data.images[rows]
            if c.augment:
                images = datasets.augmented(images, np.random.default_rng([c.seed, number, self.batch]))
            loss, gradients = self.net.gradients(images, self.data.labels[rows])
            self.sgd.step(gradients)
            if self.steering is not None:
                self.steering.update()
            self._follow_guide()
            self.loss += loss
            self.batch += 1
            tick(self.batch / self.batches)
            now = time.monotonic()
            due = self.batch % checkpoint_every == 0 if checkpoint_every else now - saved > _CHECKPOINT_SECONDS
            if due and self.batch < self.batches:
                self.seconds, began, saved = self.seconds + now - began, now, now
                self.save()
        self.seconds += time.monotonic() - began

    def accuracy(self) -> float:
        return float((self.net.logits(self.data.test_images).argmax(axis=1) == self.data.test_labels).mean())

    def sparsities(self) -> tuple[float, float, dict[str, float]]:
        """Over all weights, over those of pruned layers, and by layer."""
        weights, chosen = self.weights(), self.pruned()

        def share(of: dict[str, Array]) -> float:
            total = sum(w.size for w in of.values())
            return 1 - sum(int(np.count_nonzero(w)) for w in of.values()) / total if total else 0.0

        return share(weights), share(chosen), {layer_name(n): zeros(w) for n, w in weights.items()}
