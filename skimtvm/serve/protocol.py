"""Open Inference Protocol (KServe v2) bodies: bytes to checked arrays, and arrays to bytes.

Specification: KServe "Open Inference Protocol" and Triton's "Binary Tensor Data Extension". No I/O here; every body, of
whatever content, gives an InferRequest or raises InvalidRequest.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ..errors import InvalidRequest, ServingError
from ..report import TensorSpec
from .signature import DATATYPES, Signature

HEADER_LENGTH = "inference-header-content-length"
MAX_ID = 1024  # characters
_JSON_TYPES: dict[str, set[type]] = {"f": {float, int}, "i": {int}, "u": {int}, "b": {bool}}
# Parameters that change what the answer means; others may be ignored by the protocol.
_REFUSED = re.compile(r"classification|shared_memory_.*|sequence_.*")


@dataclass(frozen=True)
class OutputRequest:
    """One requested output: its index in the model's outputs, and whether to send it as raw bytes."""

    index: int
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A checked request. ``inputs``: arrays in the order of the model's inputs, which may be read-only views of the body;
    ``rows``: how much of a batch it takes."""

    id: str | None
    rows: int
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[OutputRequest, ...]


def parse_header_length(value: str | None, size: int) -> int | None:
    """The ``Inference-Header-Content-Length`` header of a body of ``size`` bytes."""
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", value) or int(value) > size:
        raise InvalidRequest(
            f"Inference-Header-Content-Length '{value[:40]}' is not a number from 0 to the {size} bytes of the body"
        )
    return int(value)


def parse_infer(body: bytes, header_length: int | None, signature: Signature) -> InferRequest:
    """The inference request ``body``, whose first ``header_length`` bytes are JSON (None: all of it).

    Raises InvalidRequest unless the request fits the model exactly.
    """
    text, binary = (body, None) if header_length is None else (body[:header_length], memoryview(body)[header_length:])
    try:
        root = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise InvalidRequest(f"request is not JSON: {e}") from None
    root = _object(root, "request")
    request_id = root.get("id")
    if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_ID):
        raise InvalidRequest(f"'id' must be a string of at most {MAX_ID} characters")
    parameters = _parameters(root, "request")
    inputs, rows = _inputs(_list(root, "inputs"), binary, signature)
    outputs = _outputs(root, _flag(parameters, "binary_data_output", "request"), signature)
    return InferRequest(request_id or None, rows, inputs, outputs)


def _inputs(items: list[Any], binary: memoryview | None, signature: Signature) -> tuple[tuple[np.ndarray, ...], int]:
    arrays: dict[str, np.ndarray] = {}
    specs = {spec.name: spec for spec in signature.inputs}
    for k, item in enumerate(items):
        tensor = _object(item, f"inputs[{k}]")
        name = _known(tensor.get("name"), list(specs), f"inputs[{k}]", "input")
        if name in arrays:
            raise InvalidRequest(f"input '{name}' is given twice")
        shape = _shape(tensor, specs[name], signature)
        size = _parameters(tensor, f"input '{name}'").get("binary_data_size")
        if size is None:
            arrays[name] = _from_json(tensor, specs[name], shape)
            continue
        arrays[name], binary = _from_bytes(tensor, size, binary, specs[name], shape)
    missing = [name for name in specs if name not in arrays]
    if missing:
        raise InvalidRequest(f"input '{missing[0]}' is missing; the model has {', '.join(specs)}")
    if binary is not None and len(binary):
        raise InvalidRequest(f"{len(binary)} bytes follow the last binary input")
    rows = {arrays[name].shape[0] for name in specs} if signature.row_axis else {1}
    if len(rows) != 1:
        raise InvalidRequest(f"the inputs differ in their first dimension: {', '.join(map(str, sorted(rows)))}")
    return tuple(arrays[name] for name in specs), rows.pop()


def _shape(tensor: dict[str, Any], spec: TensorSpec, signature: Signature) -> tuple[int, ...]:
    """The shape of ``tensor``, after checking it and the datatype against the model's."""
    want = DATATYPES[spec.dtype]
    if tensor.get("datatype") != want:
        raise InvalidRequest(
            f"input '{spec.name}': datatype is {_short(tensor.get('datatype'))}, the model takes {want}"
        )
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(d) is int for d in shape):
        raise InvalidRequest(f"input '{spec.name}': 'shape' must be a list of whole numbers")
    fixed = list(spec.shape[1:]) if signature.row_axis else list(spec.shape)
    if signature.row_axis:
        if len(shape) == len(fixed) + 1 and shape[1:] == fixed and 1 <= shape[0] <= signature.capacity:
            return tuple(shape)
        dims = ",".join(map(str, ["N", *fixed]))
        raise InvalidRequest(
            f"input '{spec.name}': shape is {_short(shape)}, the model takes [{dims}] with N from 1 to {signature.capacity}"
        )
    if shape != fixed:
        raise InvalidRequest(f"input '{spec.name}': shape is {_short(shape)}, the model takes {fixed}")
    return spec.shape


def _from_bytes(
    tensor: dict[str, Any], size: Any, binary: memoryview | None, spec: TensorSpec, shape: tuple[int, ...]
) -> tuple[np.ndarray, memoryview]:
    where = f"input '{spec.name}'"
    if "data" in tensor:
        raise InvalidRequest(f"{where} has both 'data' and 'binary_data_size'; give one")
    if binary is None:
        raise InvalidRequest(
            f"{where} has 'binary_data_size', but the Inference-Header-Content-Length header is missing"
        )
    dtype = np.dtype(spec.dtype)
    want = math.prod(shape) * dtype.itemsize
    if type(size) is not int or size != want:
        raise InvalidRequest(f"{where}: 'binary_data_size' is {_short(size)}, the shape needs {want}")
    if len(binary) < want:
        raise InvalidRequest(f"{where}: {want} bytes are announced, {len(binary)} are there")
    if dtype.kind == "b" and np.any(np.frombuffer(binary, np.uint8, want) > 1):
        raise InvalidRequest(f"{where}: a BOOL byte must be 0 or 1")
    return np.frombuffer(binary, dtype, math.prod(shape)).reshape(shape), binary[want:]


def _from_json(tensor: dict[str, Any], spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    where = f"input '{spec.name}'"
    data = tensor.get("data")
    if not isinstance(data, list):
        raise InvalidRequest(f"{where} needs 'data', a list, or binary data")
    flat = _flatten(data, shape, where)
    kind = np.dtype(spec.dtype).kind
    if not set(map(type, flat)) <= _JSON_TYPES[kind]:
        raise InvalidRequest(f"{where}: 'data' has values that are no {DATATYPES[spec.dtype]}")
    return _from_numbers(flat, np.dtype(spec.dtype), where).reshape(shape)


def _flatten(data: list[Any], shape: tuple[int, ...], where: str) -> list[Any]:
    """``data``, flat or nested as ``shape`` says, as a flat list of the right length."""
    if data and isinstance(data[0], list):
        level = [data]
        for size in shape:
            if not all(isinstance(x, list) and len(x) == size for x in level):
                raise InvalidRequest(f"{where}: 'data' is nested otherwise than its shape {list(shape)}")
            level = list(itertools.chain.from_iterable(level))
        return level
    if len(data) != math.prod(shape):
        raise InvalidRequest(
            f"{where}: 'data' has {len(data)} values, its shape {list(shape)} needs {math.prod(shape)}"
        )
    return data


def _from_numbers(flat: list[Any], dtype: np.dtype, where: str) -> np.ndarray:
    """Numbers of the right kind in ``dtype``; InvalidRequest for those that it cannot hold."""
    refusal = InvalidRequest(f"{where}: 'data' has numbers that {DATATYPES[dtype.name]} cannot hold")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if flat and not (limits.min <= min(flat) and max(flat) <= limits.max):
            raise refusal
    with np.errstate(over="ignore"):
        array = np.array(flat, np.float64 if dtype.kind == "f" else dtype).astype(dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():  # JSON has no infinity: the conversion made it
        raise refusal
    return array


def _outputs(root: dict[str, Any], binary: bool | None, signature: Signature) -> tuple[OutputRequest, ...]:
    default = bool(binary)
    names = [spec.name for spec in signature.outputs]
    items = _list(root, "outputs") if root.get("outputs") is not None else []
    if not items:
        return tuple(OutputRequest(k, default) for k in range(len(names)))
    chosen: dict[int, OutputRequest] = {}
    for k, item in enumerate(items):
        output = _object(item, f"outputs[{k}]")
        name = _known(output.get("name"), names, f"outputs[{k}]", "output")
        flag = _flag(_parameters(output, f"output '{name}'"), "binary_data", f"output '{name}'")
        index = names.index(name)
        if index in chosen:
            raise InvalidRequest(f"output '{name}' is asked for twice")
        chosen[index] = OutputRequest(index, default if flag is None else flag)
    return tuple(chosen.values())


def encode_response(
    signature: Signature, request: InferRequest, arrays: Sequence[np.ndarray]
) -> tuple[dict[str, str], bytes]:
    """Headers and body of the answer to ``request``; ``arrays``: all outputs of the model, only the request's rows.

    Raises ServingError (status 406) for NaN or infinity in an output that is to be sent as JSON.
    """
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for wanted in request.outputs:
        spec, array = signature.outputs[wanted.index], np.ascontiguousarray(arrays[wanted.index])
        entry: dict[str, Any] = {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": list(array.shape)}
        if wanted.binary:
            blobs.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ServingError(
                    f"output '{spec.name}' has NaN or infinite values, which JSON cannot carry; ask for binary_data",
                    status=406,
                )
            entry["data"] = array.reshape(-1)
        outputs.append(entry)
    answer: dict[str, Any] = {"model_name": signature.name, "model_version": "1", "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not blobs:
        return {"content-type": "application/json"}, text
    return (
        {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))},
        b"".join([text, *blobs]),
    )


# ---- pieces of JSON ----------------------------------------------------------------------------------------------


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON object, not {_short(value)}")
    return value


def _list(root: dict[str, Any], key: str) -> list[Any]:
    value = root.get(key)
    if not isinstance(value, list):
        raise InvalidRequest(f"'{key}' must be a list of JSON objects")
    return value


def _parameters(owner: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    for name in _object(parameters, f"'parameters' of {where}"):
        if _REFUSED.fullmatch(name):
            raise InvalidRequest(f"{where}: parameter '{name}' is not supported by this server")
    return parameters


def _flag(parameters: dict[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{where}: parameter '{name}' must be true or false")
    return value


def _known(name: Any, names: list[str], where: str, kind: str) -> str:
    if not isinstance(name, str):
        raise InvalidRequest(f"{where}: 'name' must be a string")
    if name not in names:
        close = difflib.get_close_matches(name[:200], names, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"the model has {', '.join(names)}"
        raise InvalidRequest(f"{kind} {_short(name)} is unknown; {hint}")
    return name


def _short(value: Any) -> str:
    return _repr.repr(value)


_repr = reprlib.Repr()  # bounded in depth and length: the value is the client's
_repr.maxlist = _repr.maxstring = 60
_repr.maxdict = 2
