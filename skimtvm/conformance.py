"""ONNX's own backend test suite against SkimTVM, beside what TVM's importer alone makes of the same cases.

    python -m skimtvm.conformance --output docs/onnx_conformance --jobs 2

writes ``.txt``, one case a line (kind, name, outcome, outcome of plain TVM), and ``.md``, the summary.
Each case runs in a forked process of its own with a time limit, so that a crash costs one case. The outcome of a case:

``pass``     the outputs have the expected shapes and types, and values within the tolerance of the case
``refused``  a SkimError that says what is not supported; for plain TVM any exception
``wrong``    another result
``error``    an exception that is no SkimError, or an InternalError
``crash``    the process was ended by a signal, or by the time limit
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .errors import InternalError, SkimError

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")  # "real" would be downloaded
OUTCOMES = ("pass", "refused", "wrong", "error", "crash")
LIMIT = 60.0  # seconds of CPU time for one case
WALL = 900.0  # seconds after which a case that waits for something is ended
Run = Callable[[onnx.ModelProto, list[list[Any]]], list[Sequence[Any]]]


@dataclass(frozen=True)
class Case:
    """One case of the suite: ``data``: pairs of inputs and expected outputs."""

    name: str
    kind: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """``note``: the message of the error, or how the result differs."""

    status: str
    note: str = ""


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _value(path: Path, declared: Any) -> Any:
    data = path.read_bytes()
    if declared.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if declared.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _stored(folder: Path, prefix: str, declared: Any) -> list[Any]:
    files = sorted(folder.glob(f"{prefix}_*.pb"), key=lambda f: int(f.stem.rpartition("_")[2]))
    return [_value(f, v.type) for f, v in zip(files, declared, strict=False)]


def cases(kinds: Iterable[str] = KINDS) -> list[Case]:
    """The cases that come with the onnx package, by kind and name."""
    from onnx.backend.test.loader import load_model_tests

    found = []
    for kind in kinds:
        with np.errstate(all="ignore"):  # some expected outputs are infinite
            tests = load_model_tests(kind=kind)
        for test in tests:
            if test.model is not None:
                data = [([_plain(v) for v in i], [_plain(v) for v in o]) for i, o in test.data_sets]
                model = test.model
            else:
                model = onnx.load(os.path.join(test.model_dir, "model.onnx"))
                folders = sorted(Path(test.model_dir).glob("test_data_set*"))
                data = [
                    (_stored(f, "input", model.graph.input), _stored(f, "output", model.graph.output)) for f in folders
                ]
            found.append(Case(test.name, kind, model, data, test.rtol, test.atol))
    return sorted(found, key=lambda c: (KINDS.index(c.kind), c.name))


def run_skim(model: onnx.ModelProto, batches: list[list[Any]]) -> list[Sequence[Any]]:
    """Outputs for each list of inputs, by SkimTVM's backend."""
    from .onnx_backend import prepare

    rep = prepare(model)
    return [rep.run(inputs) for inputs in batches]


def run_tvm(model: onnx.ModelProto, batches: list[list[Any]]) -> list[Sequence[Any]]:
    """Outputs for each list of inputs, by TVM's importer, operator definitions and code generator as they are."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    mod = relax.transform.LegalizeOps()(from_onnx(model))
    vm = relax.VirtualMachine(relax.build(mod, "llvm"), tvm.cpu())
    results: list[Sequence[Any]] = []
    for inputs in batches:
        found = vm["main"](*(tvm.runtime.tensor(np.ascontiguousarray(i)) for i in inputs))
        results.append([t.numpy() for t in ([found] if hasattr(found, "numpy") else found)])
    return results


def judge(case: Case, run: Run, refusals: tuple[type[Exception], ...]) -> Outcome:
    """Run ``case`` in this process. ``refusals``: exceptions that count as a clear refusal."""
    from onnx.backend.test.runner import Runner

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = run(case.model, [inputs for inputs, _ in case.data])
    except InternalError as e:
        return Outcome("error", _line(f"InternalError: {e}"))
    except refusals as e:
        return Outcome("refused", _line(e if isinstance(e, SkimError) else f"{type(e).__name__}: {e}"))
    except Exception as e:
        return Outcome("error", _line(f"{type(e).__name__}: {e}"))
    try:
        for (_, expected), outputs in zip(case.data, found, strict=True):
            Runner.assert_similar_outputs(expected, outputs, case.rtol, case.atol)
            for want, got in zip(expected, outputs, strict=True):  # the runner takes a scalar for an array of one
                if isinstance(want, np.ndarray) and np.shape(got) != want.shape:
                    raise AssertionError(f"shape {np.shape(got)} in place of {want.shape}")
    except (AssertionError, TypeError, AttributeError) as e:
        return Outcome("wrong", _line(e))
    return Outcome("pass")


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def _child(case: Case, run: Run, refusals: tuple[type[Exception], ...], pipe: Any) -> None:
    faulthandler.disable()  # the parent reports how a case ended
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, WALL)
    pipe.send(judge(case, run, refusals))
    pipe.close()


def isolated(
    wanted: Sequence[Case],
    run: Run,
    refusals: tuple[type[Exception], ...],
    *,
    jobs: int = 1,
    progress: Callable[[int, Case, Outcome], None] | None = None,
) -> dict[str, Outcome]:
    """Outcome of each case, by name; every case in a process of its own, ``jobs`` at a time."""
    fork = multiprocessing.get_context("fork")  # the cases and TVM are in memory already
    todo, live = list(reversed(wanted)), dict[Any, tuple[Case, Any]]()
    done: dict[str, Outcome] = {}
    while todo or live:
        while todo and len(live) < jobs:
            case = todo.pop()
            here, there = fork.Pipe(duplex=False)
            process: Any = fork.Process(target=_child, args=(case, run, refusals, there))
            process.start()
            there.close()
            live[here] = case, process
        for ready in multiprocessing.connection.wait(list(live)):
            pipe: Any = ready
            case, process = live.pop(pipe)
            try:
                outcome = pipe.recv()
            except EOFError:
                outcome = None
            process.join()
            if outcome is None:
                name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
                limit = name in ("SIGALRM", "SIGPROF")
                outcome = Outcome("crash", f"no result in {LIMIT:.0f} s" if limit else f"the process ended by {name}")
            done[case.name] = outcome
            if progress:
                progress(len(done), case, outcome)
    return {c.name: done[c.name] for c in wanted}


def skim_outcomes(wanted: Sequence[Case], **options: Any) -> dict[str, Outcome]:
    """Outcome of each case with SkimTVM. ``options``: see ``isolated``."""
    _preload()
    return isolated(wanted, run_skim, (SkimError,), **options)


def tvm_outcomes(wanted: Sequence[Case], **options: Any) -> dict[str, Outcome]:
    """Outcome of each case with TVM alone. ``options``: see ``isolated``."""
    _preload()
    return isolated(wanted, run_tvm, (Exception,), **options)


def _preload() -> None:
    """Import what every case needs before the first fork."""
    import onnx.backend.test.runner
    import onnx.reference
    import tvm.relax.frontend.onnx

    from . import compiler, onnx_backend

    del onnx, tvm, compiler, onnx_backend


# ---- the list and its summary ------------------------------------------------------------------------------------


def read_list(path: str | os.PathLike[str]) -> dict[str, tuple[str, str]]:
    """Case -> outcome with SkimTVM and with TVM alone, from the ``.txt`` that this module wrote."""
    lines = [line.split() for line in Path(path).read_text().splitlines() if not line.startswith("#")]
    return {name: (ours, theirs) for _, name, ours, theirs in lines}


def as_list(all_cases: Sequence[Case], ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome]) -> str:
    head = f"# {_versions()}: kind, case, outcome with SkimTVM, outcome with TVM alone\n"
    return head + "".join(f"{c.kind} {c.name} {ours[c.name].status} {theirs[c.name].status}\n" for c in all_cases)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("onnx", "apache-tvm", "numpy"))


def as_markdown(all_cases: Sequence[Case], ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome]) -> str:
    """The summary: counts by kind, by operator, and why cases are refused."""
    lines = ["# ONNX conformance", "", *_INTRODUCTION, ""]
    lines += [f"Made with {_versions()} by `python -m skimtvm.conformance --output docs/onnx_conformance`.", ""]
    lines += ["| kind | cases | engine | " + " | ".join(OUTCOMES) + " |", "|---|---:|---|" + "---:|" * len(OUTCOMES)]
    for kind in (*KINDS, "all"):
        chosen = [c for c in all_cases if kind in ("all", c.kind)]
        for engine, found in (("SkimTVM", ours), ("TVM alone", theirs)):
            count = Counter(found[c.name].status for c in chosen)
            cells = " | ".join(str(count[status]) for status in OUTCOMES)
            lines.append(f"| {kind} | {len(chosen)} | {engine} | {cells} |")
    lines += ["", "## Why cases are refused", "", "| cases | reason | for example |", "|---:|---|---|"]
    reasons: dict[str, list[str]] = {}
    for c in all_cases:
        if ours[c.name].status == "refused":
            reasons.setdefault(_reason(ours[c.name].note), []).append(c.name)
    for reason, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {len(names)} | {reason.replace('|', chr(92) + '|')} | {names[0]} |")
    lines += ["", "## Passes by operator", "", "Cases of kind `node`, by the first operator of their model.", ""]
    lines += ["| operator | cases | SkimTVM | TVM alone |", "|---|---:|---:|---:|"]
    table: dict[str, list[str]] = {}
    for c in all_cases:
        if c.kind == "node" and not c.name.endswith(("_expanded", "_expanded_ver18")):
            table.setdefault(c.model.graph.node[0].op_type, []).append(c.name)
    for op, names in sorted(table.items()):
        passes = [sum(found[n].status == "pass" for n in names) for found in (ours, theirs)]
        lines.append(f"| {op} | {len(names)} | {passes[0]} | {passes[1]} |")
    return "\n".join(lines) + "\n"


_INTRODUCTION = (
    "What SkimTVM makes of the backend test suite that comes with the onnx package (`onnx.backend.test`), through",
    "`skimtvm.onnx_backend`, beside TVM alone: `from_onnx`, `LegalizeOps`, `relax.build` for LLVM, on the same cases.",
    "A case passes if shapes and types agree and the values are within its own tolerance. Refused means an error that",
    "says what is not supported (TVM alone: any exception); wrong is another value, shape or type; error is an exception",
    "that SkimTVM did not intend; crash is a process that ended by a signal or took too long.",
    "",
    "Where an input is a parameter that a compiled module must know beforehand (the target of a Reshape, the axes of a",
    "reduction), `skimtvm.onnx_backend` compiles the model for the values that are fed; TVM alone gets the model as it is.",
    "float16, bfloat16 and float64 are computed in float32, and the backend returns them in the declared type.",
)


def _reason(note: str) -> str:
    """``note`` without what differs from case to case: names, shapes, versions, remedies."""
    text = re.sub(r"\((node '[^']*', )?opset \d+\)", "", note.partition(";")[0])
    text = re.sub(r" (node )?'[^']*'", "", text)
    text = re.sub(r"\([\d,? a-z]*\)|\(node.*", "", text)
    text = re.sub(r"opset \d+", "opset", text)
    return " ".join(text.replace(" :", ":").split())[:140]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m skimtvm.conformance", description="ONNX's backend test suite")
    parser.add_argument("--output", metavar="PREFIX", help="write PREFIX.txt and PREFIX.md (overwrites them)")
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="cases whose name matches; prints them, writes nothing"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    options = parser.parse_args(arguments)
    if options.output and options.only:
        parser.error("--output wants all cases: leave out --only")
    warnings.simplefilter("ignore")
    chosen = [c for c in cases() if re.search(options.only, c.name)]
    start = time.monotonic()

    def progress(done: int, case: Case, outcome: Outcome) -> None:
        if options.only or outcome.status not in ("pass", "refused"):
            print(f"{outcome.status:8}{case.name} {outcome.note}", flush=True)
        elif done % 100 == 0:
            print(f"{done} of {len(chosen)} cases, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    ours = skim_outcomes(chosen, jobs=options.jobs, progress=progress)
    print("SkimTVM:", dict(Counter(o.status for o in ours.values())))
    if options.output:
        theirs = tvm_outcomes(chosen, jobs=options.jobs)
        print("TVM alone:", dict(Counter(o.status for o in theirs.values())))
        for suffix, text in (("txt", as_list(chosen, ours, theirs)), ("md", as_markdown(chosen, ours, theirs))):
            path = Path(f"{options.output}.{suffix}")
            part = path.with_suffix(path.suffix + ".part")
            part.write_text(text)
            part.replace(path)
    return 0 if all(o.status in ("pass", "refused") for o in ours.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
