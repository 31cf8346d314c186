"""Train a small network, prune it while training, fine-tune it with the mask: the seed's scripts as one function.

A run can be killed at any time; started again it goes on from its last checkpoint and ends bit for bit as it would have.
The order of the data is a function of seed and epoch, everything else that matters is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import InvalidOption
from . import datasets
from .demo_run import PHASES, Run
from .files import load_arrays, save_arrays, write_bytes
from .nets import to_onnx
from .pruner import TrainingDiverged
from .rundir import Config, RunDir, read_config

Array = npt.NDArray[Any]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Result:
    """What a finished run gives: top-1 of the dense and of the final network, share of zeros over all weights and, in
    ``pruned_sparsity``, over the weights of layers that were pruned, and by layer."""

    run: Path
    dense_accuracy: float
    accuracy: float
    sparsity: float
    pruned_sparsity: float
    layers: dict[str, float]
    seconds: float  # of training, over all processes that took part
    guide: dict[str, str] = field(default_factory=dict)  # what guided pruning decided, by layer


def train(
    config: Config, folder: Path, *, progress: Progress | None = None, checkpoint_every: int | None = None
) -> Result:
    """Run ``config`` in the run directory ``folder``, or go on with what is there.

    ``checkpoint_every``: batches between checkpoints within an epoch, by default one every 30 seconds.
    Raises InvalidOption (another configuration, no data), TrainingDiverged (NaN; the last checkpoint stays).
    """
    data = datasets.load(config.data, limit=config.limit)
    directory = RunDir(folder, config)
    run = Run(config, directory, data)
    state = directory.restore()
    if state is not None:
        run.restore(state)
    else:
        if config.start is not None:
            run.fill(load_arrays(Path(config.start) / "dense.npz"))
            run.dense_accuracy = run.accuracy()
            run.phase = 1
        run.begin_phase()
    try:
        _phases(run, progress, checkpoint_every)
    except TrainingDiverged as e:
        last = f"; checkpoint: {directory.checkpoint}" if directory.checkpoint.exists() else ""
        raise TrainingDiverged(f"{PHASES[run.phase]} epoch {run.epoch + 1}: {e}{last}") from None
    model = to_onnx(run.spec, run.net.state(), data.image, name=config.name)
    write_bytes(directory.model, model.SerializeToString(deterministic=True))
    overall, chosen, layers = run.sparsities()
    return Result(folder, run.dense_accuracy, run.accuracy(), overall, chosen, layers, run.seconds, dict(run.decisions))


def predict(folder: Path) -> tuple[Array, datasets.Dataset]:
    """Logits f32[N, classes] of a finished run's network for all test images, from the framework that trained it.

    Raises InvalidOption for a folder without a finished run.
    """
    config = read_config(folder)
    run = Run(config, RunDir(folder, config), datasets.load(config.data, limit=config.limit))
    state = load_arrays(run.folder.checkpoint)
    run.restore(state)
    if run.phase < config.phases:
        raise InvalidOption(f"run directory '{folder}' is not finished; run it again to go on")
    return run.net.logits(run.data.test_images), run.data


def _phases(run: Run, progress: Progress | None, checkpoint_every: int | None) -> None:
    c = run.config
    last = c.phases
    total = sum(c.epochs[:last])

    def tick(part: float) -> None:
        if progress is not None and total:
            done = sum(c.epochs[: run.phase]) + run.epoch + part
            progress(f"{PHASES[run.phase]} {run.epoch + 1}/{c.epochs[run.phase]}", done / total)

    while run.phase < last:
        while run.epoch < c.epochs[run.phase]:
            run.train_epoch(tick, checkpoint_every)
            overall, chosen, layers = run.sparsities()
            record = {
                "phase": PHASES[run.phase],
                "epoch": run.epoch + 1,
                "step": (sum(c.epochs[: run.phase]) + run.epoch + 1) * run.batches,
                "loss": run.loss / run.batches,
                "penalty": run.sgd.pruner.penalty(),
                "decay_factor": 1.0 if run.steering is None else run.steering.dial.value,
                "accuracy": run.accuracy(),
                "sparsity": overall,
                "pruned_sparsity": chosen,
                "layers": layers,
            }
            if run.guide is not None:
                record["guide"] = dict(run.decisions)
            run.folder.log(record)
            run.folder.note_time({"phase": record["phase"], "epoch": record["epoch"], "seconds": round(run.seconds, 3)})
            run.epoch, run.batch, run.loss = run.epoch + 1, 0, 0.0
            run.save()
        if run.phase == 0:
            run.dense_accuracy = run.accuracy()
            save_arrays(run.folder.path / "dense.npz", run.net.state())
        run.phase, run.epoch = run.phase + 1, 0
        if run.phase < last:
            run.begin_phase()
        run.save()
