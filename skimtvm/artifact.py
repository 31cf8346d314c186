"""The compiled module on disk: a shared library with its manifest appended, written completely or not at all.

File = ELF shared library, then the trailer: ``START``, the manifest as UTF-8 JSON, a fixed footer. The dynamic loader
ignores bytes after the ELF image. The footer carries sizes and checksums, so that a truncated or damaged file is
refused before any of it is executed. Reading needs neither TVM nor NumPy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import EnvironmentProblem, InternalError, InvalidArtifact, InvalidOption, OutputExists, SkimError
from .report import Manifest

FORMAT = 1
START = b"\x00SKIMTVM"
MAGIC = b"SkimTVM\x1a"
# manifest size, ELF size, CRC-32 of the manifest, of the ELF part, and of the footer without that field; format, magic.
# Format and magic stay the last 12 bytes in every format to come.
FOOTER = struct.Struct("<QQIIII8s")
_CHUNK = 1 << 20
_ELF64_HEADER = 64
_DTYPE = re.compile("bool|float(16|32|64)|u?int(8|16|32|64)")
_NOISE = (b"Scope Saving:", b"Scope Loaded:")
_stderr_lock = threading.Lock()


class CompiledModule(Protocol):
    """What ``write`` needs of the compiler's result: the manifest and a TVM executable that can be exported."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def executable(self) -> Any: ...


def write(compiled: CompiledModule, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Link ``compiled`` into the shared library ``path`` and return its path.

    The file appears under its name only when it is complete; a failure or Ctrl-C leaves nothing behind. Two writes of
    the same module give the same bytes. Raises OutputExists if the file exists (without ``overwrite``) or cannot be
    written, InvalidOption for a name that does not end in .so, EnvironmentProblem if no linker works.
    """
    target = check_output(path, overwrite=overwrite)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise _unwritable(target, e) from None
    try:
        built = work / "module.so"
        linker = _export(compiled.executable, built, work)
        tools = compiled.manifest.tools | {"linker": linker}
        _append_trailer(built, dataclasses.replace(compiled.manifest, tools=tools))
        _publish(built, target, overwrite)
    except OSError as e:
        raise _unwritable(target, e) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """``path`` as the name of a module that can be written: worth asking before minutes of compilation. See write()."""
    target = Path(path)
    if target.suffix != ".so":
        raise InvalidOption(f"output '{target}': the name must end in .so, or the TVM runtime will not load it")
    if target.is_dir():
        raise OutputExists(f"output '{target}' is a directory; name a file in it")
    if target.exists() and not target.is_file():
        raise OutputExists(f"output '{target}' is not a regular file; choose another name")
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(f"output '{target}' exists; choose another name or pass --overwrite (overwrite=True)")
    if not target.parent.is_dir():
        raise OutputExists(f"output '{target}': there is no folder '{target.parent}'; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputExists(f"output '{target}': folder '{target.parent}' is not writable; choose another folder")
    return target


def read_manifest(path: str | os.PathLike[str], *, verify: bool = True) -> Manifest:
    """The manifest of the module ``path``; ``verify`` also compares the checksum of its code and weights (1 GB/s).

    Raises InvalidArtifact if there is no such file, or it is not a SkimTVM module, is truncated, damaged, or has
    another format version.
    """
    where = f"module '{os.fspath(path)}'"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open(), which would wait for ever on a pipe
            raise InvalidArtifact(f"{where} is not a regular file; give the .so that skimtvm compile wrote")
        with open(path, "rb") as f:
            return _read(f, where, verify)
    except OSError as e:
        raise InvalidArtifact(f"{where} cannot be read: {e.strerror or e}; check its name and permissions") from None


def _read(f: IO[bytes], where: str, verify: bool) -> Manifest:
    size = os.fstat(f.fileno()).st_size
    if f.read(4) != b"\x7fELF":
        raise InvalidArtifact(f"{where} is not a SkimTVM module (no shared library); make one with: skimtvm compile")
    footer = _tail(f, size)
    if footer is None:
        if _was_cut(f, size):
            raise InvalidArtifact(f"{where} is truncated ({size} bytes); copy the file again or recompile")
        raise InvalidArtifact(
            f"{where} is a shared library, but not a SkimTVM module; make one with: skimtvm compile MODEL.onnx"
        )
    payload_size, elf_size, payload_crc, elf_crc, footer_crc, version, _ = FOOTER.unpack(footer)
    if version != FORMAT:
        raise InvalidArtifact(
            f"{where} has module format {version}, this skimtvm reads format {FORMAT}; recompile the model"
        )
    damaged = InvalidArtifact(f"{where} is damaged (its checksum does not match); copy the file again or recompile")
    if footer_crc != _footer_crc(footer) or elf_size + len(START) + payload_size + FOOTER.size != size:
        raise damaged
    f.seek(elf_size)
    if f.read(len(START)) != START:
        raise damaged
    payload = f.read(payload_size)  # no larger than the file: the sizes add up
    if zlib.crc32(payload) != payload_crc or (verify and _crc(f, elf_size) != elf_crc):
        raise damaged
    return _parse(payload, where)


def _tail(f: IO[bytes], size: int) -> bytes | None:
    if size < _ELF64_HEADER + len(START) + FOOTER.size:
        return None
    f.seek(size - FOOTER.size)
    footer = f.read(FOOTER.size)
    return footer if footer.endswith(MAGIC) else None


def _was_cut(f: IO[bytes], size: int) -> bool:
    """Whether an ELF file without footer lost its end: the section table, which is the last part of what linkers
    write, is incomplete, or a trailer begins after it."""
    f.seek(0)
    header = f.read(_ELF64_HEADER)
    if len(header) < _ELF64_HEADER:
        return True
    table, entry_size, entries = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    end = table + entry_size * entries
    if end > size:
        return True
    f.seek(end)
    return f.read(len(START)) == START


def _footer_crc(footer: bytes) -> int:
    return zlib.crc32(footer[:24] + footer[28:])


def _crc(f: IO[bytes], size: int) -> int:
    f.seek(0)
    crc = 0
    while size > 0 and (chunk := f.read(min(_CHUNK, size))):
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc


def _parse(payload: bytes, where: str) -> Manifest:
    try:
        manifest = Manifest.from_json(payload.decode())
        _check(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise InvalidArtifact(
            f"{where} has a manifest that this skimtvm cannot read; recompile with this version"
        ) from None


def _check(m: Manifest) -> None:
    """ValueError unless every field that the runtime relies on has its type: the file may come from anyone."""
    if not isinstance(m.options, dict) or not isinstance(m.tools, dict):
        raise ValueError
    texts = [
        *m.tools,
        *m.tools.values(),
        m.skimtvm_version,
        m.tvm_version,
        m.target,
        m.model_sha256,
        m.model_name,
        *m.features,
        *m.warnings,
    ]
    numbers = [*m.calls, *m.batches, *(n for v in m.variants for n in (v.batch, *v.calls))]
    for spec in (*m.inputs, *m.outputs):
        texts += [spec.name, spec.dtype]
        numbers += spec.shape
    for layer in (*m.layers, *(layer for v in m.variants for layer in v.layers)):
        texts += [layer.name, layer.op, layer.workload, layer.kernel, layer.reason, layer.epilogue, layer.symbol]
        numbers += [layer.macs, layer.nnz, layer.weights, layer.stored_bytes]
    # Half a surrogate pair, which no file or terminal takes, is a ValueError here.
    json.dumps([texts, m.options], ensure_ascii=False).encode()
    if not all(isinstance(t, str) for t in texts) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError
    tables = [(m.layers, m.calls), *((v.layers, v.calls) for v in m.variants)]
    if any(k >= len(layers) for layers, calls in tables for k in calls):
        raise ValueError
    if not all(_DTYPE.fullmatch(s.dtype) and 8 * math.prod(s.shape) < 1 << 63 for s in (*m.inputs, *m.outputs)):
        raise ValueError
    _check_batches(m)


def _check_batches(m: Manifest) -> None:
    if [v.batch for v in m.variants] != list(m.batches[:-1]) or len(m.seconds) != len(m.batches):
        raise ValueError
    if not m.batches:
        return
    firsts = {spec.shape[0] for spec in (*m.inputs, *m.outputs)}
    if not m.inputs or firsts != {m.batches[-1]} or list(m.batches) != sorted({*m.batches} - {0}):
        raise ValueError
    if not all(isinstance(s, float) and 0 < s < math.inf for s in m.seconds):
        raise ValueError


def _append_trailer(built: Path, manifest: Manifest) -> None:
    payload = manifest.to_json().encode()
    with open(built, "r+b") as f:
        elf_size = os.fstat(f.fileno()).st_size
        head = struct.pack("<QQII", len(payload), elf_size, zlib.crc32(payload), _crc(f, elf_size))
        tail = struct.pack("<I8s", FORMAT, MAGIC)
        f.seek(elf_size)
        f.write(START + payload + head + struct.pack("<I", zlib.crc32(head + tail)) + tail)
        f.flush()
        os.fsync(f.fileno())


def _publish(built: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(built, target)
    else:
        try:
            os.link(built, target)  # unlike a rename it fails if somebody else has made the file meanwhile
        except FileExistsError:
            raise OutputExists(f"output '{target}' exists; choose another name or pass --overwrite") from None
        except OSError:  # a file system without hard links
            os.replace(built, target)
    with contextlib.suppress(OSError):  # makes the name durable; not every file system can
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _unwritable(target: Path, e: OSError) -> OutputExists:
    return OutputExists(f"output '{target}' cannot be written: {e.strerror or e}; choose another place or make room")


def _export(executable: Any, built: Path, work: Path) -> str:
    """Write the bare library ``built`` and return the name and version of the linker that made it."""
    used: list[str] = []

    def linked(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        used.append(link(output, objects, options))

    try:
        with quiet_tvm():
            executable.export_library(str(built), fcompile=linked, workspace_dir=str(work))
        return used[-1]
    except (SkimError, OSError):
        raise
    except Exception as e:
        if shutil.disk_usage(work).free < _CHUNK:
            raise OSError(28, "no space left on the device") from e
        reason = next((line for line in reversed(str(e).splitlines()) if line.strip()), type(e).__name__)
        raise InternalError(f"TVM could not export the module: {reason.strip()}") from e


def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> str:
    """Link object files into the shared library ``output`` with the first of $CXX, $CC, g++, gcc, clang, cc, ld that
    works; returns its first line of --version. Raises EnvironmentProblem if none works, OSError if the disk is full."""
    failures = []
    for command in _linkers():
        args = [*command, "-o", output, *map(str, objects), *(options or ())]
        try:
            done = subprocess.run(args, check=False, stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
        except OSError as e:
            failures.append(f"{command[0]}: {e.strerror}")
            continue
        if done.returncode == 0:
            return version_of(command[0])
        if "No space left" in done.stderr:
            raise OSError(28, "no space left on the device")
        failures.append(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    raise EnvironmentProblem(
        f"no working linker ({'; '.join(failures) or 'neither a C compiler nor ld in PATH'}); install gcc or binutils"
    )


def version_of(program: str) -> str:
    """First line of ``program --version``, or its name where it has none."""
    done = subprocess.run(
        [program, "--version"], check=False, stdin=subprocess.DEVNULL, capture_output=True, errors="replace"
    )
    return next(iter(done.stdout.splitlines()), "") or Path(program).name


def _linkers() -> Iterator[list[str]]:
    flags = ["-shared", "-z", "noexecstack"]
    for variable in ("CXX", "CC"):
        if command := shlex.split(os.environ.get(variable, "")):
            yield [*command, "-fPIC", *flags]
    for name in ("g++", "gcc", "clang++", "clang", "c++", "cc"):
        if found := shutil.which(name):
            yield [found, "-fPIC", *flags]
    for name in ("ld", "ld.lld", "ld.gold"):
        if found := shutil.which(name):
            yield [found, *flags, "--as-needed", "-l:libm.so.6", "-l:libc.so.6"]
            yield [found, *flags]  # without the C library: Python has its symbols


@contextlib.contextmanager
def quiet_tvm() -> Iterator[None]:
    """Drop the "Scope Saving/Loaded" lines that TVM leaves on stderr, and pass on everything else that is written."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stderr_lock)
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        except (OSError, AttributeError, ValueError):  # no stderr: nothing to silence
            yield
            return
        kept = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            kept.seek(0)
            for line in kept:
                if not any(noise in line for noise in _NOISE):
                    os.write(2, line)
