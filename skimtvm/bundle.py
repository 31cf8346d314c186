"""A folder from which a module runs without Python: the module, TVM's runtime, a C library, header and CMake package.

    bundle/
      MODULE.so                          the module as it was, manifest included
      bundle.json                        what this is: module, inputs, outputs, versions, how the C library was made
      include/skimtvm.h                  the C interface
      lib/                               libskimtvm_c.so, libtvm_runtime.so, libtvm_ffi.so; each finds the others beside it
      src/                               instead of libskimtvm_c.so where it was not built: its source, for CMake to build
      cmake/skimtvm-config.cmake         find_package(skimtvm): target skimtvm::skimtvm, variable skimtvm_MODULE
      licenses/                          of what was not made here

Nothing here imports TVM: its libraries are copied as they were installed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .artifact import read_manifest, version_of
from .errors import EnvironmentProblem, InvalidArtifact, InvalidOption, OutputExists
from .report import Manifest

NATIVE = Path(__file__).parent / "native"
SOURCES = ("skimtvm_c.cc", "module_file.cc")
HEADERS = ("module_file.h", "tvm_calls.h")
MARK = "bundle.json"
LIBRARIES = (("tvm", "libtvm_runtime.so"), ("tvm_ffi", "libtvm_ffi.so"))
FFI_HEADERS = ("tvm/ffi/c_api.h", "dlpack/dlpack.h")


@dataclass(frozen=True)
class Bundle:
    """``sizes``: bytes of each file, by its path in the folder; ``compiler``: what built the C library, empty where its
    source is in the bundle instead."""

    path: Path
    module: str
    sizes: dict[str, int]
    compiler: str


def package(
    module: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False, source: bool = False
) -> Bundle:
    """Write the bundle of ``module`` (.so) to the new folder ``output``, completely or not at all.

    The C library is built with $CXX, g++, clang++ or c++; with ``source``, or where there is none of them, its source is
    written instead. ``overwrite`` replaces an older bundle, and nothing else. Raises InvalidArtifact for what is no
    module of this TVM, OutputExists, and EnvironmentProblem where a compiler or TVM's libraries do not work.
    """
    file, target = Path(module), Path(os.path.abspath(output))
    manifest = read_manifest(file)
    if file.suffix != ".so":
        raise InvalidOption(
            f"module '{file}': the name must end in .so, or the TVM runtime will not load it; rename it"
        )
    _check_version(manifest, file)
    _check_output(target, overwrite)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise _unwritable(target, e) from None
    try:
        made = work / "bundle"
        compiler = _fill(made, file, manifest, source)
        _publish(made, target, overwrite, work)
    except OSError as e:
        raise _unwritable(target, e) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sizes = {str(f.relative_to(target)): f.stat().st_size for f in sorted(target.rglob("*")) if f.is_file()}
    return Bundle(Path(output), file.name, sizes, compiler)


def _check_version(manifest: Manifest, file: Path) -> None:
    try:
        installed = importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem("apache-tvm is not installed; pip install apache-tvm==0.27.0.post1") from None
    if manifest.tvm_version.split(".")[:2] != installed.split(".")[:2]:
        raise InvalidArtifact(
            f"module '{file}' was made with TVM {manifest.tvm_version}, this is TVM {installed}; recompile the model"
        )


def _check_output(target: Path, overwrite: bool) -> None:
    if not target.name:
        raise InvalidOption(f"output '{target}' is no name for a new folder")
    if not target.parent.is_dir():
        raise OutputExists(f"output '{target}': there is no folder '{target.parent}'; create it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExists(f"output '{target}' exists; choose another name or pass --overwrite")
    if target.is_symlink() or not (target / MARK).is_file():
        raise OutputExists(
            f"output '{target}' exists and is not a bundle; it will not be replaced; choose another name"
        )


def _unwritable(target: Path, e: OSError) -> OutputExists:
    return OutputExists(f"output '{target}' cannot be written: {e.strerror or e}; choose another place or make room")


def _publish(made: Path, target: Path, overwrite: bool, work: Path) -> None:
    if overwrite and target.exists():
        os.rename(target, work / "old")
        try:
            os.rename(made, target)
        except OSError:
            os.rename(work / "old", target)
            raise
    elif os.path.lexists(target):  # somebody else made it meanwhile
        raise OutputExists(f"output '{target}' exists; choose another name or pass --overwrite")
    else:
        os.rename(made, target)


def _fill(made: Path, file: Path, manifest: Manifest, source: bool) -> str:
    for folder in ("include", "lib", "cmake", "licenses"):
        (made / folder).mkdir(parents=True)
    shutil.copyfile(file, made / file.name)  # never stripped: that would cut the manifest off
    shutil.copyfile(NATIVE / "skimtvm.h", made / "include" / "skimtvm.h")
    for name, library in LIBRARIES:
        _copy_library(_home(name) / "lib" / library, made / "lib" / library)
    compiler = "" if source else _build(made / "lib")
    if not compiler:
        _copy_sources(made / "src")
    version = manifest.tvm_version
    text = (NATIVE / "skimtvm-config.cmake.in").read_text()
    text = text.replace("@MODULE@", file.name.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$"))
    (made / "cmake" / "skimtvm-config.cmake").write_text(text.replace("@TVM_VERSION@", version))
    _copy_licenses(made / "licenses")
    about = {
        "module": file.name,
        "model": manifest.model_name,
        "model_sha256": manifest.model_sha256,
        "target": manifest.target,
        "features": manifest.features,
        "batches": manifest.batches,
        "inputs": [dataclasses.asdict(s) for s in manifest.inputs],
        "outputs": [dataclasses.asdict(s) for s in manifest.outputs],
        "skimtvm": manifest.skimtvm_version,
        "tvm": version,
        "c_library": compiler or "source",
    }
    (made / MARK).write_text(json.dumps(about, indent=1) + "\n")
    return compiler


def _home(package_name: str) -> Path:
    spec = importlib.util.find_spec(package_name)
    if spec is None or spec.origin is None:
        raise EnvironmentProblem(f"{package_name} is not installed; pip install apache-tvm==0.27.0.post1")
    return Path(spec.origin).parent


def _copy_library(source: Path, to: Path) -> None:
    if not source.is_file():
        raise EnvironmentProblem(f"TVM's library '{source}' is missing; install apache-tvm==0.27.0.post1 again")
    shutil.copyfile(source, to)
    to.chmod(0o755)
    if strip := shutil.which("strip"):  # the wheels come stripped; a TVM built from source does not
        done = subprocess.run([strip, "--strip-unneeded", str(to)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentProblem(f"{strip} failed on '{source}': {(done.stderr.splitlines() or ['no reason'])[0]}")


def _copy_sources(to: Path) -> None:
    for name in (*SOURCES, *HEADERS):
        to.mkdir(exist_ok=True)
        shutil.copyfile(NATIVE / name, to / name)
    for name in FFI_HEADERS:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_home("tvm_ffi") / "include" / name, to / name)


def _compilers() -> Iterator[list[str]]:
    if command := shlex.split(os.environ.get("CXX", "")):
        yield command
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            yield [found]


def _build(lib: Path) -> str:
    """Build libskimtvm_c.so in ``lib`` and return the compiler's version; empty if there is no compiler."""
    failures = []
    version = ".".join(importlib.metadata.version("apache-tvm").split(".")[:3])
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-s"]
    flags += [f'-DSKIMTVM_TVM_VERSION="{version}"', f"-I{NATIVE}", f"-I{_home('tvm_ffi') / 'include'}"]
    # Nothing refers to libtvm_runtime by name, yet it registers the virtual machine.
    link = [f"-L{lib}", "-ltvm_ffi", "-Wl,--no-as-needed", "-ltvm_runtime", "-Wl,-rpath,$ORIGIN"]
    link += ["-Wl,-soname,libskimtvm_c.so", "-o", str(lib / "libskimtvm_c.so")]
    for command in _compilers():
        args = [*command, *flags, *(str(NATIVE / name) for name in SOURCES), *link]
        try:
            done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", check=False)
        except OSError as e:
            failures.append(f"{command[0]}: {e.strerror}")
            continue
        if done.returncode == 0:
            return version_of(command[0])
        if "No space left" in done.stderr:
            raise OSError(28, "no space left on the device")
        failures.append(f"{command[0]}: {next((x for x in done.stderr.splitlines() if 'error' in x), 'failed')}")
    if failures:
        raise EnvironmentProblem(f"no working C++ compiler ({'; '.join(failures)}); repair it or pass --source")
    return ""


def _copy_licenses(to: Path) -> None:
    for name in ("apache-tvm", "apache-tvm-ffi"):
        for file in importlib.metadata.files(name) or ():
            stem = file.name.upper()
            if ".dist-info" in str(file) and stem.startswith(("LICENSE", "NOTICE")):
                path = Path(str(file.locate()))
                if path.is_file():
                    shutil.copyfile(path, to / f"{name}-{file.name}")
