"""Tuning logs: the record format, and files that several writers share. Needs no TVM. See tuning_logs/README.md."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidOption, OutputExists, UnsupportedWorkload
from ..workload import ConvWorkload, DenseWorkload, WinogradWorkload

SCHEMA = 1
SHIPPED = Path(__file__).parent.parent / "tuning_logs"
_WORKLOADS: dict[str, Any] = {"conv2d": ConvWorkload, "dense": DenseWorkload, "winograd": WinogradWorkload}


@dataclass(frozen=True)
class Sparsity:
    """What the zeros of a weight look like. ``stored``: fraction of the R x 1 blocks (of the kernel) with a nonzero;
    ``row_std``: standard deviation of the nonzeros of an output channel; ``signature``: hash of the places of the
    nonzeros."""

    nnz: int
    density: float
    stored: float
    row_mean: float
    row_max: int
    row_std: float
    signature: str


@dataclass(frozen=True)
class Key:
    """What a measurement belongs to. Layers with equal keys run the same code on the same zeros."""

    cpu: str  # LLVM's name of the CPU, e.g. znver4
    isa: str
    kernel: str
    workload: ConvWorkload | DenseWorkload
    layout: str
    signature: str
    threads: int


@dataclass(frozen=True)
class Record:
    """One line. ``kind``: ``trial``, or ``best`` for knobs that won the last comparison against the default (or the
    default itself, where nothing beat it). ``version``: of the kernel's code and knobs (``sites.version``).

    ``median_s``, ``spread`` (10th and 90th percentile): seconds of a call over ``samples`` samples; None with ``error``
    for a candidate that failed. ``default_s``: median of the default knobs in the same, interleaved rounds.
    ``predicted``: the model's guess of default_s / median_s before the measurement, where it made one.
    """

    kind: str
    cpu: str
    isa: str
    kernel: str
    version: str
    workload: ConvWorkload | DenseWorkload
    layout: str
    sparsity: Sparsity
    knobs: Mapping[str, int | bool]
    default_knobs: Mapping[str, int | bool]
    threads: int
    median_s: float | None
    spread: tuple[float, float] | None
    samples: int
    default_s: float | None
    cpu_model: str = ""
    error: str = ""
    predicted: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    schema: int = SCHEMA

    @property
    def key(self) -> Key:
        s = self.sparsity.signature
        return Key(self.cpu, self.isa, self.kernel, self.workload, self.layout, s, self.threads)

    @property
    def gain(self) -> float:
        """Times as fast as the default knobs; 0 for a failure."""
        return self.default_s / self.median_s if self.median_s and self.default_s else 0.0

    @property
    def is_default(self) -> bool:
        return dict(self.knobs) == dict(self.default_knobs)

    def to_json(self) -> str:
        raw = dataclasses.asdict(self)
        kind = next(name for name, cls in _WORKLOADS.items() if type(self.workload) is cls)
        raw["workload"] = {"type": kind, **raw["workload"]}
        raw["density"] = self.sparsity.density
        for name in ("median_s", "default_s", "predicted"):
            if raw[name] is not None:
                raw[name] = float(f"{raw[name]:.6g}")
        if raw["spread"] is not None:
            raw["spread"] = [float(f"{s:.6g}") for s in raw["spread"]]
        return json.dumps({k: v for k, v in raw.items() if v not in ("", None) or k in _NULLS}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Record:
        """Raises ValueError for a line that is no record of this schema, whatever it holds: a log may come from anyone."""
        try:
            raw = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"schema {raw.get('schema')!r} is not {SCHEMA}")
        missing = [name for name in _REQUIRED if name not in raw]
        if missing:
            raise ValueError(f"no '{missing[0]}'")
        known = {f.name for f in dataclasses.fields(Record)}
        values = {name: value for name, value in raw.items() if name in known}
        try:
            shape = dict(raw["workload"])
            values["workload"] = _WORKLOADS[shape.pop("type")](**shape)
            values["sparsity"] = Sparsity(**raw["sparsity"])
            values["spread"] = None if raw["spread"] is None else (float(raw["spread"][0]), float(raw["spread"][1]))
            record = Record(**values)
            _check(record)
        except (TypeError, KeyError, IndexError, AttributeError, OverflowError, UnsupportedWorkload) as e:
            raise ValueError(f"a field has the wrong form ({type(e).__name__}: {e})") from None
        return record


_NULLS = ("median_s", "spread", "default_s")
_REQUIRED = tuple(
    f.name
    for f in dataclasses.fields(Record)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda v: isinstance(v, str) and " ".join(v.split()).isprintable(),
    "int": lambda v: type(v) is int,
    "float": lambda v: type(v) in (int, float) and math.isfinite(v),
    "float | None": lambda v: v is None or _TYPES["float"](v),
    "tuple[float, float] | None": lambda v: v is None or all(math.isfinite(s) and s > 0 for s in v),
    "Sparsity": lambda v: isinstance(v, Sparsity),
    "ConvWorkload | DenseWorkload": lambda v: type(v) in _WORKLOADS.values(),
    "Pair": lambda v: type(v) is tuple and len(v) == 2 and all(type(d) is int for d in v),
    "Padding": lambda v: type(v) is tuple and len(v) == 4 and all(type(d) is int for d in v),
    "Mapping[str, int | bool]": lambda v: isinstance(v, dict) and all(type(n) in (int, bool) for n in v.values()),
    "Mapping[str, str]": lambda v: isinstance(v, dict) and all(_TYPES["str"](t) for p in v.items() for t in p),
}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def _check(r: Record) -> None:
    """ValueError unless every field has its type: records are keys of dictionaries, and name files."""
    for owner in (r, r.sparsity, r.workload):
        for f in dataclasses.fields(owner):
            if not _TYPES[str(f.type)](getattr(owner, f.name)):
                raise ValueError(f"'{f.name}' has the wrong form")
    if not all(_FILE_NAME.fullmatch(name) for name in (r.cpu, r.kernel)):
        raise ValueError("'cpu' or 'kernel' is no name of a folder or file")
    if r.kind not in ("trial", "best"):
        raise ValueError(f"kind '{r.kind}' is neither trial nor best")
    for seconds in (r.median_s, r.default_s):
        if seconds is not None and seconds <= 0:
            raise ValueError(f"{seconds!r} is no time")
    if r.kind == "best" and r.median_s is None:
        raise ValueError("a best record without a time")


@dataclass(frozen=True)
class Damage:
    """A line that is no record."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}; the line is skipped"


@dataclass(frozen=True)
class Log:
    """Records in the order in which they were written, file after file."""

    records: tuple[Record, ...] = ()
    damage: tuple[Damage, ...] = ()

    @staticmethod
    def read(folders: Path | Sequence[Path], cpu: str = "*") -> Log:
        """All ``<cpu>/<kernel>.jsonl`` in ``folders``; a folder that does not exist is an empty log. Raises
        InvalidOption for one that cannot be read."""
        records: list[Record] = []
        damage: list[Damage] = []
        for folder in [folders] if isinstance(folders, Path) else folders:
            if folder.exists() and not folder.is_dir():
                raise InvalidOption(
                    f"tuning log '{folder}' is no folder; give the folder that holds <cpu>/<kernel>.jsonl"
                )
            for path in sorted(folder.glob(f"{cpu}/*.jsonl")):
                _read(path, records, damage)
        return Log(tuple(records), tuple(damage))

    def best(self) -> dict[Key, Record]:
        """The newest ``best`` record of each key."""
        return {r.key: r for r in self.records if r.kind == "best"}


def _read(path: Path, records: list[Record], damage: list[Damage]) -> None:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InvalidOption(f"tuning log '{path}' cannot be read: {e.strerror}") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line.decode()))
        except ValueError as e:
            damage.append(Damage(path, number, f"damaged ({str(e)[:120]})"))


def path_of(folder: Path, record: Record) -> Path:
    return folder / record.cpu / f"{record.kernel}.jsonl"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- writing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Descriptor of ``path`` for appending, under an exclusive lock; the file of that name, even if another process has
    replaced it while this one waited."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield descriptor
                return
        finally:
            os.close(descriptor)


def append(folder: Path, record: Record) -> None:
    """Add one line, in a single write. Raises OutputExists if the log cannot be written."""
    path = path_of(folder, record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as descriptor:
            size = os.fstat(descriptor).st_size
            broken = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a writer was killed in its last line
            line = (b"\n" if broken else b"") + record.to_json().encode() + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(28, "no space left on the device")
    except OSError as e:
        raise _unwritable(path, e) from None


def _unwritable(path: Path, e: OSError) -> OutputExists:
    return OutputExists(f"tuning log '{path}' cannot be written: {e.strerror or e}; choose another --log")


def rewrite(path: Path, keep: Callable[[Sequence[Record]], Iterable[Record]]) -> tuple[int, int]:
    """Replace the records of the file ``path`` by ``keep`` of them, in one step, while other writers wait. Damaged lines
    go. Returns the numbers of lines before and after."""
    try:
        with _locked(path):
            records: list[Record] = []
            damage: list[Damage] = []
            _read(path, records, damage)
            kept = list(keep(records))
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_text("".join(r.to_json() + "\n" for r in kept), encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            return len(records) + len(damage), len(kept)
    except OSError as e:
        raise _unwritable(path, e) from None


def prune(folder: Path, current: Callable[[Record], bool] = lambda record: True) -> tuple[int, int]:
    """Keep the newest ``best`` record of each key, of those that are ``current``. Returns lines before and after."""
    before = after = 0
    for path in sorted(folder.glob("*/*.jsonl")):
        was, now_has = rewrite(path, lambda records: Log(tuple(filter(current, records))).best().values())
        before, after = before + was, after + now_has
    return before, after


def merge(folder: Path, sources: Sequence[Path]) -> int:
    """Add the records of ``sources`` that ``folder`` does not hold. Returns how many."""
    have = {r.to_json() for r in Log.read(folder).records}
    added = 0
    for record in Log.read(sources).records:
        line = record.to_json()
        if line not in have:
            append(folder, record)
            have.add(line)
            added += 1
    return added
