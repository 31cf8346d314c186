"""What must hold whatever is fed: each check takes a source of randomness and raises if it does not hold.

``outcomes`` runs a check in another process, and so also notices a crash, endless work and memory without bound.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import resource
import signal
import struct
import tempfile
import traceback
import zlib
from pathlib import Path
from random import Random

import numpy as np

import skimtvm
from skimtvm import artifact
from skimtvm.errors import InternalError, InvalidArtifact, SkimError
from skimtvm.report import LayerRecord, Manifest, TensorSpec

from .graphs import damage, flip, random_graph

SECONDS, MEMORY = 60, 6 << 30  # of one check: CPU time, address space


def refused(action, *args):
    """Result of ``action``; None if it raised an error that is meant for the user."""
    try:
        return action(*args)
    except InternalError:
        raise
    except SkimError as e:
        assert "\n" not in str(e) and str(e)
        return None


def import_damaged(rnd: Random) -> None:
    from skimtvm.importer import load_model

    refused(load_model, damage(random_graph(rnd), rnd))


def compile_damaged(rnd: Random) -> None:
    refused(skimtvm.compile, damage(random_graph(rnd), rnd))


def import_flipped(rnd: Random) -> None:
    from skimtvm.importer import load_model

    refused(load_model, flip(random_graph(rnd).SerializeToString(), rnd))


def same_as_onnxruntime(rnd: Random) -> None:
    import onnxruntime

    model = random_graph(rnd)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(rnd.randrange(2**32)).standard_normal(session.get_inputs()[0].shape).astype(np.float32)
    expected = session.run(None, {"x": x})
    found = skimtvm.compile(model).run({"x": x}, threads=1)
    for spec, want in zip(session.get_outputs(), expected, strict=True):
        got = found[spec.name]
        assert got.shape == want.shape and got.dtype == want.dtype, spec.name
        finite = np.isfinite(want)
        scale = max(1.0, float(np.abs(want[finite]).max(initial=0)))
        np.testing.assert_allclose(got[finite], want[finite], rtol=2e-3, atol=2e-4 * scale, err_msg=spec.name)


MANIFEST = Manifest(
    skimtvm_version=skimtvm.__version__,
    tvm_version="0.27.0",
    target="znver4",
    features=("avx2", "fma"),
    inputs=(TensorSpec("x", (1, 3, 8, 8), "float32"),),
    outputs=(TensorSpec("y", (1, 10), "float32"),),
    layers=(LayerRecord("conv", "conv2d", "1x3x8x8 * 4x3x3x3", "f32_csr_conv2d_1x7_avx512", "sparse", 10, 5, 20, 80),),
    calls=(0,),
    model_sha256="0" * 64,
    model_name="net",
    options={"batch": 1},
)
VALUES = (
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    math.nan,
    math.inf,
    "",
    "\ud800",
    "x" * 1000,
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    ["float32"],
)


def sealed(payload: bytes, elf: bytes = b"\x7fELF" + bytes(60)) -> bytes:
    """A module file with right checksums around ``payload``."""
    head = struct.pack("<QQII", len(payload), len(elf), zlib.crc32(payload), zlib.crc32(elf))
    tail = struct.pack("<I8s", artifact.FORMAT, artifact.MAGIC)
    return elf + artifact.START + payload + head + struct.pack("<I", zlib.crc32(head + tail)) + tail


def read_artifact(data: bytes) -> Manifest | None:
    """The manifest in ``data``, whose fields then have the types that the runtime relies on; None if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.so")
        path.write_bytes(data)
        try:
            found = artifact.read_manifest(path)
        except InvalidArtifact as e:
            assert "\n" not in str(e)
            return None
    for spec in (*found.inputs, *found.outputs):
        np.empty(tuple(min(d, 1) for d in spec.shape))
        spec.name.encode()
    for layer in found.layers:
        assert layer.density >= 0 and layer.name.encode() is not None
    assert all(found.layers[k] for k in found.calls)
    assert Manifest.from_json(found.to_json()) == found
    return found


def damaged_bytes(rnd: Random) -> None:
    whole = sealed(MANIFEST.to_json().encode())
    broken = flip(whole, rnd)
    assert broken == whole or read_artifact(broken) is None


def spoil(raw, rnd: Random) -> None:
    """Change up to three values somewhere in a JSON object to something that its writer did not mean."""
    for _ in range(rnd.randint(1, 3)):
        place = raw
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rnd.choice(keys)
            if isinstance(place[key], (dict, list)) and rnd.random() < 0.6:
                place = place[key]
                continue
            if rnd.random() < 0.2:
                del place[key]
            elif rnd.random() < 0.2 and isinstance(place, dict):
                place["more"] = copy.deepcopy(rnd.choice(VALUES))
            else:
                place[key] = copy.deepcopy(rnd.choice(VALUES))
            break


def damaged_manifest(rnd: Random) -> None:
    """Right checksums around a manifest that no compiler wrote."""
    raw = json.loads(MANIFEST.to_json())
    spoil(raw, rnd)
    payload = json.dumps(raw, ensure_ascii=rnd.random() < 0.5).encode("utf-8", "surrogatepass")
    read_artifact(sealed(flip(payload, rnd) if rnd.random() < 0.3 else payload))


def damaged_tuning_log(rnd: Random) -> None:
    """One damaged line between two good ones, which must come through."""
    from skimtvm.tune.log import SHIPPED, Log

    lines = [line for path in sorted(SHIPPED.glob("*/*.jsonl")) for line in path.read_bytes().splitlines()]
    good, raw = rnd.choice(lines), json.loads(rnd.choice(lines))
    spoil(raw, rnd)
    bad = json.dumps(raw).encode()
    if rnd.random() < 0.4:
        bad = flip(bad, rnd)
    elif rnd.random() < 0.05:
        bad = b"[" * 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "znver4", "kernel.jsonl")
        path.parent.mkdir()
        path.write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
        log = Log.read(Path(folder))
    assert len(log.records) >= 2 and log.records[0] == log.records[-1]
    log.best()
    for record in log.records:
        assert record.gain >= 0 and isinstance(record.is_default, bool)
        record.to_json()
    assert all("\n" not in str(d) for d in log.damage)


def damaged_request(rnd: Random) -> None:
    """An inference request, JSON or binary, that its client did not mean: refused, or arrays that fit the model."""
    from skimtvm.errors import InvalidRequest
    from skimtvm.serve.protocol import parse_header_length, parse_infer
    from skimtvm.serve.signature import Signature

    x, mask = TensorSpec("x", (4, 2, 3), "float32"), TensorSpec("mask", (4, 2), "bool")
    signature = Signature("m", "skimtvm", (x, mask), (TensorSpec("y", (4, 2), "float32"),), (4,), True)
    rows, binary = rnd.randint(1, 4), rnd.random() < 0.5
    values: dict = {"parameters": {"binary_data_size": 24 * rows}} if binary else {"data": [0.5] * (6 * rows)}
    message = {
        "id": "1",
        "inputs": [
            {"name": "x", "shape": [rows, 2, 3], "datatype": "FP32", **values},
            {"name": "mask", "shape": [rows, 2], "datatype": "BOOL", "data": [[True, False]] * rows},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
    if rnd.random() < 0.8:
        spoil(message, rnd)
    text = json.dumps(message).encode()
    if rnd.random() < 0.3:
        text = flip(text, rnd)
    body = text + (bytes(24 * rows) if binary else b"")
    if rnd.random() < 0.1:
        body = flip(body, rnd)
    header = rnd.choice([str(len(text))] * 5 + [None, "", "-1", "9" * 40, "1e3", "\u0661", str(rnd.randrange(200))])
    try:
        found = parse_infer(body, parse_header_length(header if binary else None, len(body)), signature)
    except InvalidRequest as e:
        assert "\n" not in str(e) and len(str(e)) < 2000
        return
    assert 1 <= found.rows <= 4 and [o.index for o in found.outputs] == [0]
    for spec, array in zip(signature.inputs, found.inputs, strict=True):
        assert array.dtype == spec.dtype and array.shape == signature.shape(spec, found.rows)


CHECKS = (
    same_as_onnxruntime,
    compile_damaged,
    import_damaged,
    import_flipped,
    damaged_manifest,
    damaged_bytes,
    damaged_tuning_log,
    damaged_request,
)


def _child(check, seeds, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for seed in seeds:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            check(Random(seed))
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc(limit=-3))


def outcomes(check, first: int, count: int):
    """For each of ``count`` seeds from ``first`` on: "" or what went wrong with ``check``. A process of its own runs
    them, and a new one goes on where it ended."""
    context = multiprocessing.get_context("fork")
    seed = first
    while seed < first + count:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(check, range(seed, first + count), there))
        process.start()
        there.close()
        try:
            while seed < first + count:
                outcome = here.recv()
                seed += 1
                yield outcome
        except EOFError:
            process.join()
            code = process.exitcode
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            seed += 1
            yield f"no result in {SECONDS} s" if name == "SIGPROF" else f"the process ended by {name}"
        finally:
            here.close()
            process.join()
