"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption, OutputExists


def write_bytes(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write ``data`` to ``path`` through a temporary file beside it. Raises OutputExists."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}-", dir=path.parent)
        with open(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # fails where a file has appeared meanwhile
    except FileExistsError:
        raise OutputExists(
            f"output '{path}' exists; choose another name or pass --overwrite (overwrite=True)"
        ) from None
    except OSError as e:
        raise OutputExists(f"output '{path}' cannot be written: {e.strerror or e}; choose another place") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_output(path: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """``path`` as the name of a file to be written. Raises InvalidOption or OutputExists."""
    target = Path(path)
    if target.suffix != suffix:
        raise InvalidOption(f"output '{target}': the name must end in {suffix}")
    if target.is_dir():
        raise OutputExists(f"output '{target}' is a directory; name a file in it")
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(f"output '{target}' exists; choose another name or pass --overwrite (overwrite=True)")
    if not target.parent.is_dir():
        raise OutputExists(f"output '{target}': there is no folder '{target.parent}'; create it first")
    return target


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Arrays by name in an .npz, written atomically; what ``load_arrays`` gives back is the same bit for bit."""
    buffer = io.BytesIO()
    names = list(arrays)
    # Names are kept apart from the members of the archive, where "/" and the like mean something.
    members = {f"a{i}": arrays[n] for i, n in enumerate(names)}
    np.savez(buffer, names=np.array(names, dtype=np.str_), **members)  # type: ignore[arg-type]
    write_bytes(Path(path), buffer.getvalue())


def load_arrays(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """What save_arrays wrote. Raises InvalidOption for any other file."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {str(n): data[f"a{i}"] for i, n in enumerate(data["names"])}
    except OSError as e:
        raise InvalidOption(f"checkpoint '{path}' cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InvalidOption(f"'{path}' is not a checkpoint, or is damaged; delete it to start again") from None
