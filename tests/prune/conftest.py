"""The command as users start it, and a small folder of IDX files to train on."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import skimtvm

PACKAGE = Path(skimtvm.__file__).parent.parent


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "skimtvm", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def skim():
    def run(*arguments):
        child = start(*arguments)
        out, err = child.communicate(timeout=100)
        return child.returncode, out, err

    return run


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """960 + 200 images of 10 x 10 pixels in 4 classes: a bright quadrant each, under noise."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for prefix, count, pack in (("train", 960, True), ("t10k", 200, False)):
        labels = rng.integers(0, 4, count).astype(np.uint8)
        images = rng.integers(0, 120, (count, 10, 10)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            y, x = divmod(int(label), 2)
            image[5 * y : 5 * y + 5, 5 * x : 5 * x + 5] += 60
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            data = bytes([0, 0, 8, array.ndim]) + b"".join(d.to_bytes(4, "big") for d in array.shape) + array.tobytes()
            (folder / (name + ".gz" * pack)).write_bytes(gzip.compress(data) if pack else data)
    return folder
