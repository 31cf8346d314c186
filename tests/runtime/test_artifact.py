"""Writing modules completely or not at all, and refusing files that are not exactly what was written."""

import dataclasses
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skimtvm import artifact
from skimtvm.artifact import FOOTER, MAGIC, START, read_manifest, write
from skimtvm.errors import EnvironmentProblem, InternalError, InvalidArtifact, InvalidOption, OutputExists, SkimError


def without_linker(manifest):
    assert manifest.tools["linker"]
    return dataclasses.replace(manifest, tools={})


def test_manifest_round_trip(file, sample):
    assert without_linker(read_manifest(file)) == sample.MANIFEST


def test_two_writes_give_the_same_bytes(sample, file, tmp_path):
    again = write(sample.build(), tmp_path / "other-name.so")
    assert again.read_bytes() == file.read_bytes()


def test_file_is_executable_like_a_library_and_nothing_else_is_left(sample, tmp_path):
    path = write(sample.build(), tmp_path / "m.so")
    assert os.listdir(tmp_path) == ["m.so"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_no_noise_on_stderr(sample, tmp_path, capfd):
    write(sample.build(), tmp_path / "m.so")
    assert capfd.readouterr().err == ""


def test_quiet_tvm_passes_on_other_lines(capfd):
    with artifact.quiet_tvm():
        os.write(2, b"vm.cc:1: Scope Saving:global\nreal trouble\n")
    assert capfd.readouterr().err == "real trouble\n"


# ---- outputs that cannot be written ------------------------------------------------------------------------------


def test_existing_output_is_kept_unless_overwrite(sample, tmp_path):
    path = tmp_path / "m.so"
    path.write_text("mine")
    with pytest.raises(OutputExists, match=r"m\.so' exists; .*--overwrite"):
        write(sample.build(), path)
    assert path.read_text() == "mine"
    write(sample.build(), path, overwrite=True)
    assert without_linker(read_manifest(path)) == sample.MANIFEST


def test_dangling_link_counts_as_existing(sample, tmp_path):
    (tmp_path / "m.so").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists, match="exists"):
        write(sample.build(), tmp_path / "m.so")


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("m.bin", InvalidOption, r"must end in \.so"),
        ("no/such/m.so", OutputExists, "there is no folder"),
        ("folder.so", OutputExists, "is a directory"),
        ("pipe.so", OutputExists, "not a regular file"),
    ],
)
def test_bad_output(sample, tmp_path, name, error, text):
    (tmp_path / "folder.so").mkdir()
    os.mkfifo(tmp_path / "pipe.so")
    with pytest.raises(error, match=text):
        write(sample.build(), tmp_path / name, overwrite=True)


def test_folder_without_permission(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputExists, match="not writable; choose another folder"):
        write(sample.build(), tmp_path / "m.so")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x\ny")])
def test_failure_leaves_nothing(sample, tmp_path, failure):
    class Executable:
        def export_library(self, path, **_):
            with open(path, "wb") as f:
                f.write(b"half")
            raise failure

    (tmp_path / "m.so").write_text("mine")
    expected = {OSError: OutputExists, RuntimeError: InternalError}.get(type(failure), KeyboardInterrupt)
    with pytest.raises(expected):
        write(sample.Compiled(sample.MANIFEST, Executable()), tmp_path / "m.so", overwrite=True)
    assert os.listdir(tmp_path) == ["m.so"]
    assert (tmp_path / "m.so").read_text() == "mine"


def test_file_that_appears_meanwhile_is_not_replaced(sample, tmp_path):
    target = tmp_path / "m.so"
    real = sample.build().executable

    class Executable:
        def export_library(self, path, **options):
            real.export_library(path, **options)
            target.write_text("theirs")

    with pytest.raises(OutputExists, match="exists"):
        write(sample.Compiled(sample.MANIFEST, Executable()), target)
    assert target.read_text() == "theirs"


# ---- linkers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH that holds only the tools that are asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    usual = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin"])

    def add(*names):
        for name in names:
            if (found := shutil.which(name, path=usual)) is None:
                pytest.skip(f"{name} is not installed")
            (folder / name).symlink_to(found)

    return add


def test_plain_ld_is_enough(sample, tools, tmp_path, in_process, monkeypatch):
    tools("ld")
    path = write(sample.build(), tmp_path / "m.so")
    text = (
        "import sys, numpy, skimtvm; m = skimtvm.load(sys.argv[1]); print(m.run(numpy.ones((1,3,8,8),'f4'))['y'].sum())"
    )
    monkeypatch.undo()
    assert float(in_process(text, path)) > 0


def test_no_linker(sample, tools, tmp_path):
    with pytest.raises(EnvironmentProblem, match="install gcc or binutils"):
        write(sample.build(), tmp_path / "m.so")
    assert sorted(os.listdir(tmp_path)) == ["bin"]


def test_broken_compiler_in_the_environment_falls_back(sample, tools, tmp_path, monkeypatch):
    tools("ld")
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    assert without_linker(read_manifest(write(sample.build(), tmp_path / "m.so"))) == sample.MANIFEST


# ---- files that are not modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\x7fEL", b"hello world" * 100, b"\x7fELF", b"\x7fELF" + bytes(60)], ids=len)
def test_not_a_module(tmp_path, content):
    path = tmp_path / "m.so"
    path.write_bytes(content)
    with pytest.raises(
        InvalidArtifact, match=r"^module '.*' is (not a SkimTVM module|truncated|a shared library, but not)"
    ):
        read_manifest(path)


def test_foreign_library(tmp_path):
    maps = Path("/proc/self/maps").read_text().splitlines()
    libc = next(line.split()[-1] for line in maps if "libc.so" in line or "libc-" in line)
    path = tmp_path / "m.so"
    shutil.copy(libc, path)
    with pytest.raises(InvalidArtifact, match="is a shared library, but not a SkimTVM module; make one with"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["missing.so", "folder", "pipe"])
def test_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArtifact, match=r"cannot be read: No such file|is not a regular file"):
        read_manifest(tmp_path / name)


def test_every_truncation_is_noticed(file, tmp_path):
    whole = file.read_bytes()
    elf_size = FOOTER.unpack(whole[-FOOTER.size :])[1]
    edges = [0, 3, 4, 63, 64, 1000, elf_size // 2, elf_size - 1, elf_size + len(START), len(whole) - FOOTER.size]
    for size in (*edges, len(whole) - 12, len(whole) - 1):
        path = tmp_path / "cut.so"
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidArtifact, match=r"truncated|not a SkimTVM module"):
            read_manifest(path)
    path.write_bytes(whole[: len(whole) - 1])
    with pytest.raises(InvalidArtifact, match="is truncated"):
        read_manifest(path)


def test_bytes_added_at_the_end(file, tmp_path):
    path = tmp_path / "long.so"
    path.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InvalidArtifact):
        read_manifest(path)


def test_every_kind_of_bit_flip_is_noticed(file, tmp_path):
    whole = bytearray(file.read_bytes())
    elf_size = FOOTER.unpack(whole[-FOOTER.size :])[1]
    trailer = range(len(whole) - FOOTER.size, len(whole))
    for at in (0, 1, 70, elf_size // 2, elf_size - 1, elf_size, elf_size + 9, len(whole) - FOOTER.size - 1, *trailer):
        whole[at] ^= 1 << at % 8
        path = tmp_path / "flipped.so"
        path.write_bytes(whole)
        whole[at] ^= 1 << at % 8
        with pytest.raises(InvalidArtifact):
            read_manifest(path)


def _forge(path, payload, *, version=artifact.FORMAT, payload_size=None, elf=b"\x7fELF" + bytes(100)):
    head = struct.pack(
        "<QQII", len(payload) if payload_size is None else payload_size, len(elf), zlib.crc32(payload), zlib.crc32(elf)
    )
    tail = struct.pack("<I8s", version, MAGIC)
    path.write_bytes(elf + START + payload + head + struct.pack("<I", zlib.crc32(head + tail)) + tail)


def test_a_name_that_cannot_be_written(tmp_path, sample):
    raw = json.loads(sample.MANIFEST.to_json())
    raw["inputs"][0]["name"] = "\ud800"
    _forge(tmp_path / "m.so", json.dumps(raw).encode())
    with pytest.raises(InvalidArtifact, match="manifest that this skimtvm cannot read"):
        read_manifest(tmp_path / "m.so")


def test_other_format_version(tmp_path, sample):
    path = tmp_path / "m.so"
    _forge(path, sample.MANIFEST.to_json().encode(), version=artifact.FORMAT + 1)
    with pytest.raises(InvalidArtifact, match=r"has module format 2, this skimtvm reads format 1; recompile"):
        read_manifest(path)


@pytest.mark.parametrize("size", [0, 1, 1 << 40, (1 << 64) - 1])
def test_sizes_that_lie(tmp_path, size):
    path = tmp_path / "m.so"
    _forge(path, b"{}", payload_size=size)
    with pytest.raises(InvalidArtifact, match="damaged"):
        read_manifest(path)


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100000, b'{"features": 1}', b"9" * 5000],
    ids=["empty", "object", "list", "null", "not-utf8", "deep", "wrong-type", "long-number"],
)
def test_manifests_that_are_none(tmp_path, payload):
    path = tmp_path / "m.so"
    _forge(path, payload)
    with pytest.raises(InvalidArtifact, match="manifest that this skimtvm cannot read"):
        read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [{"calls": (5,)}, {"calls": (-1,)}, {"calls": ("0",)}, {"features": (1,)}, {"options": []}, {"target": None}],
    ids=str,
)
def test_manifests_with_fields_of_a_wrong_type(tmp_path, sample, change):
    path = tmp_path / "m.so"
    _forge(path, dataclasses.replace(sample.MANIFEST, **change).to_json().encode())
    with pytest.raises(InvalidArtifact, match="cannot read"):
        read_manifest(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    footer=st.binary(min_size=FOOTER.size, max_size=FOOTER.size), keep_magic=st.booleans(), body=st.binary(max_size=99)
)
def test_fuzzed_footer(tmp_path, footer, keep_magic, body):
    path = tmp_path / "m.so"
    end = struct.pack("<I8s", artifact.FORMAT, MAGIC) if keep_magic else b""
    path.write_bytes(b"\x7fELF" + bytes(60) + body + footer[: FOOTER.size - len(end)] + end)
    with pytest.raises(SkimError):
        read_manifest(path)


def test_reading_needs_no_tvm(file, in_process):
    text = "import sys; from skimtvm.artifact import read_manifest as r; r(sys.argv[1]); print('tvm' in sys.modules)"
    assert in_process(text, file) == "False"


def test_ctrl_c_while_linking_leaves_nothing(sample, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            write(sample.build(), tmp_path / "m.so")
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == []
