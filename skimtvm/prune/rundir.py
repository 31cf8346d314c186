"""A training run on disk: a folder named by its settings, with config.json, metrics.jsonl, checkpoint.npz, model.onnx."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption, OutputExists
from .files import load_arrays, save_arrays, write_bytes

Arrays = dict[str, npt.NDArray[Any]]
METHODS = ("dense", "l1", "surgery", "ista", "group", "ramp", "winograd")


@dataclass(frozen=True)
class Config:
    """Everything that the result of a run depends on.

    ``epochs``: dense training, pruning, fine-tuning with the mask. ``decay``: strength of the method's penalty, None
    for one that fits the number of steps; ``steer``: correct it on the way so that the sparsity is reached.
    ``sparsity``: what the pruning phase ends with at least, over all weights (for the winograd method: over the
    Winograd-domain weights). ``start``: run directory whose dense weights to begin with instead of training.
    ``guide``: the machine by which guided pruning decides on the layers (see guide.Machine; {} is the built-in model),
    None to prune all of them; then ``sparsity`` is how far a layer is thought to get.
    """

    data: str = "fashion"
    network: str = "cnn"
    solver: str = "torch"
    method: str = "l1"
    sparsity: float = 0.925
    decay: float | None = None
    steer: bool = True
    threshold: float = 1e-4
    factor: float = 10.0
    block: int = 4
    epochs: tuple[int, int, int] = (8, 4, 5)
    batch: int = 128
    lr: float = 0.05
    prune_lr: float = 0.02
    momentum: float = 0.9
    l2: float = 5e-4
    augment: bool = True
    limit: int | None = None
    threads: int = 2
    seed: int = 0
    start: str | None = None
    guide: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", tuple(self.epochs))
        if self.method not in METHODS:
            raise InvalidOption(f"method '{self.method}' is unknown; choose one of {', '.join(METHODS)}")
        if self.solver not in ("torch", "numpy"):
            raise InvalidOption(f"solver '{self.solver}' is unknown; choose torch or numpy")
        if not 0 <= self.sparsity < 1:
            raise InvalidOption(f"sparsity is {self.sparsity}; give a share of zeros from 0 to below 1")
        if len(self.epochs) != 3 or min(self.epochs) < 0:
            raise InvalidOption(f"epochs are {self.epochs}; give three whole numbers: dense, prune, fine-tune")
        if self.guide is not None and self.method in ("dense", "winograd"):
            raise InvalidOption(f"guided pruning drives l1, surgery, ista, group and ramp, not {self.method}")
        if min(self.batch, self.threads, self.block) < 1:
            raise InvalidOption("batch, threads and block must be at least 1")

    @property
    def phases(self) -> int:
        """How many of the three phases the run has."""
        return 1 if self.method == "dense" else 3

    @property
    def name(self) -> str:
        """Readable name of the run directory: data, network, method, seed, and every setting that is not the default."""
        base = Config(method=self.method)
        parts = [Path(self.data).name, self.network, self.method]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("data", "network", "method", "seed") or value == getattr(base, field.name):
                continue
            if field.name == "start":
                parts.append("from_dense")
                continue
            if field.name == "guide":
                digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
                parts.append(f"guided_{digest[:8]}" if value else "guided")
                continue
            text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if isinstance(value, float):
                text = f"{value:g}"
            parts.append(f"{field.name}_{Path(text).name}")
        return re.sub(r"[^\w.+-]", "_", "-".join([*parts, f"seed_{self.seed}"]))[:200]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        return Config(**json.loads(text))


class RunDir:
    """The folder of one run. Raises InvalidOption for a folder that belongs to another configuration."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputExists(f"run directory '{path}' cannot be made: {e.strerror}; choose another") from None
        file = path / "config.json"
        if file.exists():
            self._compare(read_config(path))
        elif any(path.iterdir()):
            raise InvalidOption(f"run directory '{path}' holds other files and no config.json; choose another")
        else:
            write_bytes(file, config.to_json().encode())

    def _compare(self, there: Config) -> None:
        mine, other = dataclasses.asdict(self.config), dataclasses.asdict(there)
        odd = [f"{k} is {other[k]!r} there and {mine[k]!r} here" for k in mine if mine[k] != other[k]]
        if odd:
            raise InvalidOption(
                f"run directory '{self.path}' belongs to another configuration: {'; '.join(odd)}; choose another directory"
            )

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.npz"

    @property
    def model(self) -> Path:
        return self.path / "model.onnx"

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def note_time(self, record: dict[str, Any]) -> None:
        """Append to times.jsonl, which is apart because times are not reproducible."""
        with open(self.path / "times.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def save(self, arrays: Arrays) -> None:
        """Write the checkpoint atomically, with the length that metrics.jsonl has now."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        save_arrays(self.checkpoint, arrays | {"metrics_bytes": np.array(size)})

    def restore(self) -> Arrays | None:
        """The checkpoint, with metrics.jsonl cut back to where it was then; None for a fresh run."""
        for stale in self.path.glob(".*-*"):  # temporary files of a killed process
            stale.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)
            return None
        arrays = load_arrays(self.checkpoint)
        with contextlib.suppress(FileNotFoundError), open(self.metrics, "r+b") as f:
            f.truncate(int(arrays.pop("metrics_bytes")))
        return arrays


def read_config(path: Path) -> Config:
    """The configuration of a run directory. Raises InvalidOption if it is none."""
    try:
        return Config.from_json((path / "config.json").read_text())
    except OSError as e:
        raise InvalidOption(f"'{path}' is not a run directory (config.json: {e.strerror})") from None
    except (ValueError, TypeError) as e:
        raise InvalidOption(f"'{path}': config.json is not that of a run ({e}); choose another directory") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run directory; a last line that was cut off by a kill is left out."""
    out: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (path / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                out.append(json.loads(line))
    return out
