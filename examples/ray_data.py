"""Batch inference over a data set on a cluster: a compiled module in Ray Data.

    pip install 'skimtvm[ray]'
    python examples/ray_data.py model.so --input images/ --output predictions/ --actors 2 --threads 1

``--input``: a folder of .npy files, each one sample or a batch of them (first axis); it must be readable on every node,
as the module must. Each actor loads the module once and keeps ``--threads`` CPUs of its node for itself, so that actors
do not fight; Ray restarts an actor that dies and gives its blocks to others. The result is a folder of Parquet files with a
column for each output. For modules with one input; with several, give ``map_batches`` a column for each.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import ray

import skimtvm

COLUMN = "data"  # of the samples in the data set


class Predictor:
    """One actor: the module, loaded once, on CPUs that no other actor of this node uses."""

    def __init__(self, path: str, threads: int, column: str = COLUMN) -> None:
        self._claim, self.cpus = claim_cpus(threads)
        os.sched_setaffinity(0, self.cpus)
        self.module = skimtvm.load(path, threads=threads)
        if len(self.module.inputs) != 1:
            raise SystemExit(f"{path} has {len(self.module.inputs)} inputs; this example feeds one")
        self.column = column

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs for ``batch[column]``, N samples: as many runs as that takes, the last one padded with zeros."""
        spec = self.module.inputs[0]
        samples = np.ascontiguousarray(batch[self.column], spec.dtype)
        count = len(samples)
        if self.module.batches:  # a module of several sizes takes any number
            return {name: array[:count] for name, array in self.module.run(samples).items()}
        size = spec.shape[0]
        parts: dict[str, list[np.ndarray]] = {output.name: [] for output in self.module.outputs}
        for start in range(0, count, size):
            piece = samples[start : start + size]
            if len(piece) < size:
                piece = np.concatenate([piece, np.zeros((size - len(piece), *piece.shape[1:]), piece.dtype)])
            for name, array in self.module.run(piece).items():
                parts[name].append(array)
        return {name: np.concatenate(arrays)[:count] for name, arrays in parts.items()}


def claim_cpus(threads: int) -> tuple[IO[str], set[int]]:
    """``threads`` CPUs of this process's affinity mask that no other claim on this node has, and what holds the claim.

    A claim is a lock on a file: it goes when the process ends, however that happens. Raises RuntimeError if all are taken.
    """
    cpus = sorted(os.sched_getaffinity(0))
    for start in range(0, len(cpus) - threads + 1, threads):
        mine = set(cpus[start : start + threads])
        name = "-".join(map(str, sorted(mine)))
        file = open(Path(tempfile.gettempdir()) / f"skimtvm-cpus-{os.getuid()}-{name}.lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, mine
        except BlockingIOError:
            file.close()
    raise RuntimeError(f"no {threads} of the CPUs {cpus} are free; use fewer actors or threads")


def predict(dataset: Any, module: str, *, actors: int, threads: int, batch_size: int) -> Any:
    """``dataset`` (column ``data``) mapped through the compiled ``module``: a data set with a column for each output.

    The cluster needs CPUs beyond those of the actors, ``actors * threads``, for the tasks that read and write.
    """
    return dataset.map_batches(
        Predictor,
        fn_constructor_kwargs={"path": os.path.abspath(module), "threads": threads},
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="compiled module (.so)")
    parser.add_argument("--input", required=True, help="folder of .npy files, samples along the first axis")
    parser.add_argument("--output", required=True, help="folder for Parquet files; must not exist")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPUs and threads of each actor")
    parser.add_argument("--batch-size", type=int, default=64, help="samples handed to an actor at a time")
    parser.add_argument("--address", help="of a running cluster; a local one is started if not given")
    options = parser.parse_args()
    if os.path.lexists(options.output):
        parser.error(f"'{options.output}' exists; choose another --output")
    # One CPU more than the actors hold: the tasks that read need one, and would wait for it for ever.
    ray.init(options.address, num_cpus=None if options.address else options.actors * options.threads + 1)
    samples = ray.data.read_numpy(os.path.abspath(options.input))
    settings = {"actors": options.actors, "threads": options.threads, "batch_size": options.batch_size}
    predict(samples, options.module, **settings).write_parquet(os.path.abspath(options.output))


if __name__ == "__main__":
    main()
