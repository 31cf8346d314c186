"""Bodies of the protocol: what is read is exactly what was sent, and anything else is refused with a reason."""

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skimtvm.errors import InvalidRequest, ServingError, UnsupportedModel
from skimtvm.report import TensorSpec
from skimtvm.serve.protocol import HEADER_LENGTH, InferRequest, encode_response, parse_header_length, parse_infer
from skimtvm.serve.signature import DATATYPES, Signature

X, FLAGS = TensorSpec("x", (4, 2, 3), "float32"), TensorSpec("flags", (4, 2), "bool")
Y, TOP = TensorSpec("y", (4, 2), "float32"), TensorSpec("top", (4,), "int64")
ROWS = Signature("m", "skimtvm", (X, FLAGS), (Y, TOP), (4,), True)
FIXED = Signature("m", "skimtvm", (TensorSpec("k", (2, 2), "int8"),), (Y,), (1,), False)
DATA = [[0.5, 1, 2], [3, 4, -5e-1]]


def x(**changes):
    tensor = {"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "data": [DATA]} | changes
    return {k: v for k, v in tensor.items() if v is not ...}


def flags(**changes):
    tensor = {"name": "flags", "shape": [1, 2], "datatype": "BOOL", "data": [True, False]} | changes
    return {k: v for k, v in tensor.items() if v is not ...}


def root(*inputs, **more):
    return json.dumps({"inputs": list(inputs), **more}).encode()


def k(**changes):
    return root({"name": "k", "shape": [2, 2], "datatype": "INT8", "data": [1, 2, 3, 4]} | changes)


def test_json():
    request = parse_infer(root(flags(), x(), id="7"), None, ROWS)
    assert (request.id, request.rows) == ("7", 1)
    np.testing.assert_array_equal(request.inputs[0], np.array([DATA], np.float32))
    np.testing.assert_array_equal(request.inputs[1], [[True, False]])
    assert [a.dtype.name for a in request.inputs] == ["float32", "bool"]
    assert [(o.index, o.binary) for o in request.outputs] == [(0, False), (1, False)]


def test_flat_and_nested_are_the_same():
    flat = parse_infer(root(x(data=DATA[0] + DATA[1]), flags()), None, ROWS)
    np.testing.assert_array_equal(flat.inputs[0], np.array([DATA], np.float32))


def test_binary():
    array = np.arange(18, dtype="float32").reshape(3, 2, 3)
    text = root(
        x(shape=[3, 2, 3], data=..., parameters={"binary_data_size": 72}),
        flags(shape=[3, 2], data=..., parameters={"binary_data_size": 6}),
        outputs=[{"name": "top", "parameters": {"binary_data": False}}, {"name": "y"}],
        parameters={"binary_data_output": True},
    )
    body = text + array.tobytes() + bytes([1, 0, 0, 1, 1, 1])
    request = parse_infer(body, len(text), ROWS)
    np.testing.assert_array_equal(request.inputs[0], array)
    np.testing.assert_array_equal(request.inputs[1], [[True, False], [False, True], [True, True]])
    assert request.rows == 3
    assert [(o.index, o.binary) for o in request.outputs] == [(1, False), (0, True)]


def test_binary_and_json_inputs_in_one_request():
    text = root(flags(), x(data=..., parameters={"binary_data_size": 24}))
    request = parse_infer(text + np.ones(6, "float32").tobytes(), len(text), ROWS)
    assert request.inputs[0].sum() == 6 and request.inputs[1].tolist() == [[True, False]]


BINARY = {"data": ..., "parameters": {"binary_data_size": 24}}


@pytest.mark.parametrize(
    "body, text",
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"inputs": [NaN]}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"3", "must be a JSON object, not 3"),
        (b"{}", "'inputs' must be a list"),
        (root(3), "inputs\\[0\\] must be a JSON object"),
        (root(x(), flags(), id=7), "'id'"),
        (root(x(), flags(), id="x" * 2000), "'id'"),
        (root(x()), "input 'flags' is missing"),
        (root(x(), x(), flags()), "'x' is given twice"),
        (root(x(), flags(name="flag")), "did you mean 'flags'"),
        (root(x(name=["x"]), flags()), "'name' must be a string"),
        (root(x(datatype="FP64"), flags()), "datatype is 'FP64', the model takes FP32"),
        (root(x(datatype=None), flags()), "the model takes FP32"),
        (root(x(shape=[5, 2, 3]), flags()), "N from 1 to 4"),
        (root(x(shape=[0, 2, 3], data=[]), flags()), "N from 1 to 4"),
        (root(x(shape=[1, 2]), flags()), "N from 1 to 4"),
        (root(x(shape=[True, 2, 3]), flags()), "whole numbers"),
        (root(x(shape="1,2,3"), flags()), "whole numbers"),
        (root(x(shape=[2, 2, 3], data=DATA * 2), flags()), "nested otherwise"),
        (root(x(data=[DATA, DATA]), flags()), "nested otherwise"),
        (root(x(data=[[[1, 2, 3], [4, 5]]]), flags()), "nested otherwise"),
        (root(x(data=[1, 2, 3]), flags()), "has 3 values, its shape \\[1, 2, 3\\] needs 6"),
        (root(x(data=[1, 2, 3, 4, 5, "6"]), flags()), "no FP32"),
        (root(x(data=[1, 2, 3, 4, 5, None]), flags()), "no FP32"),
        (root(x(data=[1, 2, 3, 4, 5, True]), flags()), "no FP32"),
        (root(x(data=[1, 2, 3, 4, 5, [6]]), flags()), "no FP32"),
        (root(x(data=[1, 2, 3, 4, 5, 1e300]), flags()), "FP32 cannot hold"),
        (root(x(data="AAAA"), flags()), "needs 'data', a list"),
        (root(x(data=...), flags()), "needs 'data', a list"),
        (root(x(), flags(data=[1, 0])), "no BOOL"),
        (root(x(), flags(shape=[2, 2], data=[True] * 4)), "differ in their first dimension: 1, 2"),
        (root(x(**BINARY), flags()), "Inference-Header-Content-Length header is missing"),
        (root(x(parameters=3), flags()), "must be a JSON object"),
        (root(x(parameters={"shared_memory_region": "r"}), flags()), "not supported"),
        (root(x(), flags(), parameters={"sequence_id": 3}), "not supported"),
        (root(x(), flags(), parameters={"binary_data_output": 1}), "true or false"),
        (root(x(), flags(), outputs=3), "'outputs' must be a list"),
        (root(x(), flags(), outputs=[{"name": "z"}]), "output 'z' is unknown; the model has y, top"),
        (root(x(), flags(), outputs=[{"name": "y"}, {"name": "y"}]), "asked for twice"),
        (root(x(), flags(), outputs=[{"name": "y", "parameters": {"classification": 3}}]), "not supported"),
    ],
)
def test_refused(body, text):
    with pytest.raises(InvalidRequest, match=text) as caught:
        parse_infer(body, None, ROWS)
    assert caught.value.status == 400 and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes, tail, text",
    [
        ({}, b"", "24 bytes are announced, 0 are there"),
        ({}, bytes(23), "24 bytes are announced, 23 are there"),
        ({}, bytes(25), "1 bytes follow"),
        ({"parameters": {"binary_data_size": 20}}, bytes(20), "is 20, the shape needs 24"),
        ({"parameters": {"binary_data_size": -24}}, bytes(24), "is -24"),
        ({"parameters": {"binary_data_size": "24"}}, bytes(24), "is '24'"),
        ({"data": []}, bytes(24), "both"),
    ],
)
def test_refused_binary(changes, tail, text):
    body = root(flags(), x(**(BINARY | changes)))
    with pytest.raises(InvalidRequest, match=text):
        parse_infer(body + tail, len(body), ROWS)


def test_a_bool_byte_is_0_or_1():
    text = root(x(), flags(data=..., parameters={"binary_data_size": 2}))
    with pytest.raises(InvalidRequest, match="must be 0 or 1"):
        parse_infer(text + b"\x01\x02", len(text), ROWS)


def test_a_long_name_does_not_come_back_whole():
    with pytest.raises(InvalidRequest) as caught:
        parse_infer(root(x(name="n" * 1_000_000)), None, ROWS)
    assert len(str(caught.value)) < 500


def test_fixed_shape():
    assert parse_infer(k(), None, FIXED).inputs[0].tolist() == [[1, 2], [3, 4]]
    for changes in ({"shape": [1, 2]}, {"shape": [4]}, {"shape": [-1, 2]}, {"shape": None}):
        with pytest.raises(InvalidRequest, match="shape"):
            parse_infer(k(**changes), None, FIXED)


@pytest.mark.parametrize("value", [128, -129, 2**63, -(2**63), 2**64 - 1])
def test_whole_numbers_out_of_range(value):
    with pytest.raises(InvalidRequest, match="INT8 cannot hold"):
        parse_infer(k(data=[1, 2, 3, value]), None, FIXED)


def test_fractions_are_no_whole_numbers():
    with pytest.raises(InvalidRequest, match="no INT8"):
        parse_infer(k(data=[1, 2, 3, 4.0]), None, FIXED)


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "x", "1_0", "٣", "11", "9" * 40])
def test_header_length(value):
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length"):
        parse_header_length(value, 10)
    assert parse_header_length(None, 10) is None and parse_header_length("10", 10) == 10


def test_a_model_that_the_protocol_cannot_carry():
    with pytest.raises(UnsupportedModel, match="bfloat16"):
        Signature("m", "p", (TensorSpec("x", (1,), "bfloat16"),), (), (1,), False)


def test_metadata():
    meta = ROWS.metadata()
    assert meta["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}
    assert meta["outputs"][1] == {"name": "top", "datatype": "INT64", "shape": [-1]}
    assert FIXED.metadata()["inputs"][0]["shape"] == [2, 2]
    assert Signature.from_json(json.loads(json.dumps(ROWS.to_json()))) == ROWS


# ---- answers -----------------------------------------------------------------------------------------------------

ANSWER = (np.array([[0.1, -2], [3, 4]], np.float32), np.array([2**62 + 1, -1]))


def request(**more):
    body = root(x(shape=[2, 2, 3], data=[DATA, DATA]), flags(shape=[2, 2], data=[True] * 4), **more)
    return parse_infer(body, None, ROWS)


def test_answer_in_json():
    headers, body = encode_response(ROWS, request(id="a"), ANSWER)
    answer = json.loads(body)
    assert headers == {"content-type": "application/json"}
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1", "a")
    y, top = answer["outputs"]
    assert y == {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [0.1, -2, 3, 4]}
    assert top["data"] == [2**62 + 1, -1]


def test_answer_in_bytes():
    asked = request(parameters={"binary_data_output": True}, outputs=[{"name": "top"}, {"name": "y"}])
    headers, body = encode_response(ROWS, asked, ANSWER)
    size = int(headers[HEADER_LENGTH])
    answer = json.loads(body[:size])
    assert [o["parameters"]["binary_data_size"] for o in answer["outputs"]] == [16, 16]
    assert "id" not in answer and not any("data" in o for o in answer["outputs"])
    assert body[size:] == ANSWER[1].tobytes() + ANSWER[0].tobytes()


def test_json_cannot_carry_nan():
    bad = (np.full((2, 2), np.nan, np.float32), ANSWER[1])
    with pytest.raises(ServingError, match=r"'y' has NaN.*binary_data") as caught:
        encode_response(ROWS, request(), bad)
    assert caught.value.status == 406
    _, body = encode_response(ROWS, request(parameters={"binary_data_output": True}), bad)
    assert struct.pack("<f", float("nan")) in body


# ---- fuzzing -----------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(body, header, signature):
    """Parsing gives a request that fits the model, or a short refusal; the answer to it can be written."""
    try:
        parsed = parse_infer(body, parse_header_length(header, len(body)), signature)
    except InvalidRequest as e:
        assert 0 < len(str(e)) < 1000
        return
    assert isinstance(parsed, InferRequest) and 1 <= parsed.rows <= signature.capacity and parsed.outputs
    for array, spec in zip(parsed.inputs, signature.inputs, strict=True):
        assert array.dtype == np.dtype(spec.dtype) and array.shape == signature.shape(spec, parsed.rows)
    outputs = [np.zeros(signature.shape(s, parsed.rows), s.dtype) for s in signature.outputs]
    encode_response(signature, parsed, outputs)


@FUZZ
@given(st.binary(max_size=300), st.none() | st.text(max_size=5) | st.integers(-5, 400).map(str))
def test_any_bytes(body, header):
    check(body, header, ROWS)


WORDS = """inputs outputs id name shape datatype data parameters binary_data binary_data_size binary_data_output
x flags y top k FP32 BOOL INT8"""
words = st.sampled_from(WORDS.split())
numbers = st.integers(-(2**64), 2**65) | st.floats() | st.sampled_from([0, 1, 2, 3, 4, 6, 24, 2**31, 2**63, -1])
values = st.recursive(
    st.none() | st.booleans() | numbers | words | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(words | st.text(max_size=4), inner, max_size=5),
    max_leaves=20,
)


@FUZZ
@given(values, st.binary(max_size=40), st.booleans(), st.sampled_from([ROWS, FIXED]))
def test_any_json(value, tail, binary, signature):
    text = json.dumps(value).encode(errors="surrogatepass")
    check(text + tail, str(len(text)) if binary else None, signature)


@st.composite
def nearly_valid(draw):
    """A valid request with some of its parts replaced, in JSON that may also be cut off or have a byte changed."""
    tensors = [x(), flags()] if draw(st.booleans()) else [x(**BINARY), flags()]
    output = {"name": "y", "parameters": {"binary_data": True}}
    message = {"inputs": tensors, "outputs": [output], "id": "1"}
    for _ in range(draw(st.integers(0, 3))):
        target = draw(st.sampled_from([message, *tensors, output]))
        target[draw(st.sampled_from(sorted(target)) | words)] = draw(values)
    text = bytearray(json.dumps(message).encode(errors="surrogatepass"))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text) - 1))
        text[at] = draw(st.integers(0, 255))
    tail = draw(st.sampled_from([b"", bytes(24), bytes(23), bytes(25)]) | st.binary(max_size=60))
    length = draw(st.sampled_from([len(text), len(text) - 1, 0, len(text) + len(tail)]))
    return bytes(text) + tail, draw(st.sampled_from([str(length), None]))


@FUZZ
@given(nearly_valid())
def test_nearly_valid(case):
    check(*case, ROWS)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(DATATYPES)), st.integers(1, 4))
def test_every_datatype_comes_through(data, dtype, rows):
    """What a client sends as bytes and as JSON is what the model gets, and what comes back is the same."""
    spec = TensorSpec("t", (4, 3), dtype)
    signature = Signature("m", "p", (spec,), (spec,), (4,), True)
    raw = data.draw(
        st.binary(min_size=rows * 3 * np.dtype(dtype).itemsize, max_size=rows * 3 * np.dtype(dtype).itemsize)
    )
    if dtype == "bool":
        raw = bytes(b & 1 for b in raw)
    array = np.frombuffer(raw, dtype).reshape(rows, 3)
    tensor = {"name": "t", "shape": [rows, 3], "datatype": DATATYPES[dtype]}
    text = root(tensor | {"parameters": {"binary_data_size": len(raw)}}, parameters={"binary_data_output": True})
    parsed = parse_infer(text + raw, len(text), signature)
    headers, body = encode_response(signature, parsed, parsed.inputs)
    assert body[int(headers[HEADER_LENGTH]) :] == raw
    if array.dtype.kind != "f" or np.isfinite(array).all():
        parsed = parse_infer(root(tensor | {"data": array.tolist()}), None, signature)
        np.testing.assert_array_equal(parsed.inputs[0], array)
        _, body = encode_response(signature, parsed, parsed.inputs)
        back = np.array(json.loads(body)["outputs"][0]["data"], dtype).reshape(rows, 3)
        np.testing.assert_array_equal(back, array)
