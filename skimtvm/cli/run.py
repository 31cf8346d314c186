"""``skimtvm run``: run a module on .npy files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputMismatch, OutputExists
from ._common import Pair, threads_option

if TYPE_CHECKING:
    import numpy as np


@click.command("run", short_help="Run a compiled module on .npy files.")
@click.argument("module", type=click.Path(path_type=Path))
@click.option(
    "--input", "inputs", multiple=True, type=Pair("NAME=FILE.npy"), help="Array for one input; repeat for each."
)
@click.option("--output-dir", required=True, type=click.Path(path_type=Path), help="Folder for NAME.npy files.")
@click.option("--overwrite", is_flag=True, help="Replace output files that exist.")
@threads_option
def run_command(
    module: Path, inputs: tuple[tuple[str, str], ...], output_dir: Path, overwrite: bool, threads: int | None
) -> None:
    """Run MODULE (.so) and write each output to OUTPUT_DIR/NAME.npy."""
    from ..runtime import load

    loaded = load(module, threads=threads)
    files = output_files(output_dir, [spec.name for spec in loaded.outputs])
    if not overwrite:
        for file in files.values():
            if os.path.lexists(file):
                raise OutputExists(f"output '{file}' exists; choose another --output-dir or pass --overwrite")
    names = [name for name, _ in inputs]
    for name in names:
        if names.count(name) > 1:
            raise InputMismatch(f"input '{name}' is given {names.count(name)} times; give it once")
    feeds = {name: read_array(name, Path(file)) for name, file in inputs}
    outputs = loaded.run(feeds)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            write_array(file, outputs[name])
    except OSError as e:
        raise OutputExists(f"output folder '{output_dir}' cannot be written: {e.strerror}; choose another") from None
    for name, file in files.items():
        array = outputs[name]
        click.echo(f"{name}: {array.dtype}[{','.join(map(str, array.shape))}] -> {file}")


def read_array(name: str, file: Path) -> np.ndarray:
    """The array in ``file``. Raises InputMismatch if there is none, or it would need pickle."""
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        reason = getattr(e, "strerror", None) or "not a NumPy array file"
        raise InputMismatch(f"input '{name}': cannot read '{file}': {reason}; write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputMismatch(f"input '{name}': '{file}' is an .npz archive; write the array alone with numpy.save")
    return array


def write_array(file: Path, array: np.ndarray) -> None:
    """numpy.save that leaves no partial file."""
    import numpy as np

    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            np.save(f, array)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def output_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """A file for each output name; characters that mean something to a file system or shell become ``_``."""
    files: dict[str, Path] = {}
    used: set[str] = set()
    for name in names:
        stem = plain = re.sub(r"[^\w.-]+", "_", name)[:120].lstrip(".-") or "output"
        number = 1
        while stem.casefold() in used:
            number += 1
            stem = f"{plain}_{number}"
        used.add(stem.casefold())
        files[name] = folder / f"{stem}.npy"
    return files
