"""Import: external data, and files that are no models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as TP
from onnx import numpy_helper as nh

from skimtvm import importer
from skimtvm.errors import InvalidModel, SkimError

from .onnx_models import W, cnn, one_conv, one_line

# --- external data -------------------------------------------------------------------------------------------------


def external(tmp_path: Path, location="net.data", **entries) -> Path:
    proto = one_conv(init={"w": W})
    tensor = proto.graph.initializer[0]
    (tmp_path / "net.data").write_bytes(b"\0" * 16 + W.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TP.EXTERNAL
    for key, value in {"location": location, "offset": 16, "length": W.nbytes, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_beside_the_model(tmp_path):
    got = importer.prepare_onnx(external(tmp_path))
    np.testing.assert_array_equal(nh.to_array(got.model.graph.initializer[0]), W)
    assert importer.prepare_onnx(external(tmp_path, length=None)).model == got.model
    first = got.sha256
    external(tmp_path)
    (tmp_path / "net.data").write_bytes(b"\0" * (16 + W.nbytes))
    assert importer.prepare_onnx(tmp_path / "net.onnx").sha256 != first


@pytest.mark.parametrize("location", ["../net.data", "/etc/hostname", "sub/../../x", "C:\\x", "..\\net.data", "", "."])
def test_external_data_outside_is_refused(tmp_path, location):
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "net.data").write_bytes(b"\0" * 1000)
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(external(inner, location=location))
    one_line(err, "tensor 'w'", "external data")


def test_external_data_through_links_is_refused(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 1000)
    (inner / "link").symlink_to(tmp_path / "secret")
    (inner / "dir").symlink_to(tmp_path)
    for location in ("link", "dir/secret"):
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(external(inner, location=location))
        one_line(err, "symbolic link")


def test_external_data_missing_truncated_or_inconsistent(tmp_path):
    cases = [(dict(location="gone.data"), "no such file"), (dict(offset=400), "truncated"),
             (dict(length=8), "8 are in"),
             (dict(offset=-1), "offset '-1'"), (dict(length="many"), "length 'many'")]  # fmt: skip
    for entries, part in cases:
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(external(tmp_path, **entries))
        one_line(err, "tensor 'w'", part)


def test_external_data_without_a_file(tmp_path):
    path = external(tmp_path)
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(source)
        one_line(err, "tensor 'w'", "pass the path")


# --- bad input -----------------------------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    good = cnn().SerializeToString()
    cases = [
        (tmp_path / "absent.onnx", "no such file"),
        (tmp_path, "is a directory"),
        (file("empty.onnx", b""), "is empty"),
        (file("text.onnx", b"<html>not found</html>"), "not an ONNX model"),
        (file("random.onnx", np.random.default_rng(3).bytes(5000)), "not an ONNX model"),
        (file("half.onnx", good[: len(good) // 2]), "truncated"),
        (file("lfs.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (file("zero.onnx", b"\0" * 100), "not an ONNX model"),
        (b"", "is empty"),
        (b"garbage", "not an ONNX model"),
        (onnx.ModelProto(), "holds no graph"),
        (42, "not int"),
        ("bad\0name.onnx", "cannot be read"),
    ]
    for source, part in cases:
        with pytest.raises(InvalidModel) as err:
            importer.prepare_onnx(source)
        one_line(err, part)


def test_every_truncation_is_refused():
    good = cnn().SerializeToString()
    for end in range(0, len(good), 97):
        with pytest.raises(SkimError):
            importer.prepare_onnx(good[:end])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(InvalidModel) as err:
        importer.prepare_onnx(path)
    one_line(err, "cannot be read")
