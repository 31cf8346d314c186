"""What the compiler takes from a log."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from skimtvm.compiler import CompileOptions, compile_model
from skimtvm.errors import InvalidOption
from skimtvm.schedules import unrolled_knobs
from skimtvm.schedules.sites import version
from skimtvm.target import TARGETS, resolve
from skimtvm.tune import log
from skimtvm.tune.log import Log, append
from skimtvm.tune.lookup import Lookup
from skimtvm.tune.tasks import extract
from skimtvm.workload import WinogradWorkload

from .samples import conv_site, model, record, winograd_site

SITE = conv_site(c=40, size=20)
TARGET = resolve()
DEFAULT = SITE.default(TARGET)
LOOPED = SITE.looped(TARGET)
OTHER = dataclasses.replace(LOOPED, vectors=3, channel_block=7)
KNOBS = dataclasses.asdict(OTHER)


def look(folder: Path, site: Any = SITE) -> tuple[Any, str]:
    return Lookup.load((folder,), TARGET)(site)


def test_the_same_layer(tmp_path: Path) -> None:
    append(tmp_path, record(SITE, knobs=KNOBS))
    knobs, why = look(tmp_path)
    assert knobs == OTHER and why.startswith("tuned: 2.00x the default")


def test_the_newest_record_wins_and_the_first_folder(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    append(a, record(SITE, knobs=KNOBS | {"vectors": 5}))
    append(a, record(SITE, knobs=KNOBS))
    append(b, record(SITE, knobs=KNOBS | {"vectors": 2}))
    assert Lookup.load((a, b), TARGET)(SITE)[0] == OTHER


def test_the_nearest_density(tmp_path: Path) -> None:
    for density, vectors in ((0.16, 2), (0.23, 5), (0.9, 7)):
        site = conv_site(c=40, size=20, density=density)
        append(tmp_path, record(site, knobs=KNOBS | {"vectors": vectors}))
    knobs, why = look(tmp_path)
    assert knobs.vectors == 5 and "at density 0.23" in why
    far = conv_site(c=40, size=20, density=0.01)
    assert look(tmp_path, far) == (far.default(TARGET), "")


def test_a_default_that_won(tmp_path: Path) -> None:
    append(tmp_path, record(SITE))
    knobs, why = look(tmp_path)
    assert knobs == DEFAULT and "the default is best" in why


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "trial"},
        {"cpu": "haswell"},
        {"isa": "avx2"},
        {"kernel": "bsr4_conv2d"},
        {"version": "0" * 12},
        {"workload": conv_site(c=41, size=20).workload},
        {"knobs": KNOBS | {"wings": 2}},
        {"knobs": KNOBS | {"vectors": 40}},
        {"knobs": KNOBS | {"rows": 4}},
        {"knobs": KNOBS | {"dense": True}},
    ],
    ids=lambda c: next(iter(c)) + str(next(iter(c.values())))[-12:],
)
def test_what_is_not_taken(change: dict[str, Any], tmp_path: Path) -> None:
    append(tmp_path, record(SITE, **({"knobs": KNOBS} | change)))
    assert look(tmp_path) == (DEFAULT, "")


def test_stale_records_and_damage_are_reported(tmp_path: Path) -> None:
    append(tmp_path, record(SITE, version="0" * 12))
    with log.path_of(tmp_path, record(SITE)).open("a") as f:
        f.write("{}\n")
    damaged, stale = Lookup.load((tmp_path,), TARGET).warnings
    assert "csr_conv2d.jsonl:2: damaged" in damaged and "1 tuning records are of another version" in stale


def test_pieces_for_threads_stay_those_of_the_layer(tmp_path: Path) -> None:
    append(tmp_path, record(SITE, knobs=KNOBS | {"chunks": 99}))
    assert look(tmp_path)[0].chunks == LOOPED.chunks


@pytest.mark.skipif(TARGET.isa != "avx512", reason="straight code is for AVX-512")
def test_straight_code_is_adapted(tmp_path: Path) -> None:
    straight = next(k for k in SITE.space(TARGET).unrolled if k.vectors > 1)
    blocked = dataclasses.replace(straight, channel_block=3)
    blocked = dataclasses.replace(blocked, chunks=unrolled_knobs.pieces(SITE.workload, blocked, SITE.dst))
    for change, expected in (
        ({"chunks": 99, "vectors": straight.vectors}, straight), ({"channel_block": 99}, straight), ({"lanes": 8}, DEFAULT),
        ({"rows": 31}, DEFAULT), ({"aligned": True}, DEFAULT), ({"dense": True}, DEFAULT), ({"channel_block": 3}, blocked),
    ):  # fmt: skip
        append(tmp_path, record(SITE, knobs=dataclasses.asdict(straight) | change))
        assert look(tmp_path)[0] == expected


def test_aligned_knobs_have_few_pieces_and_need_room(tmp_path: Path) -> None:
    aligned = next(k for k in SITE.space(TARGET).aligned if k.vectors * k.lanes < 100)
    append(tmp_path, record(SITE, knobs=dataclasses.asdict(aligned) | {"chunks": 99}))
    assert look(tmp_path)[0] == aligned
    # Input channels that are out of order, and copies that outgrow their share of L2.
    assert look(tmp_path, dataclasses.replace(SITE, channels=tuple(range(40)))) == (DEFAULT, "")
    many = conv_site(c=900, size=20, density=0.01)
    wide = dataclasses.replace(aligned, channel_block=900)
    append(tmp_path, record(many, knobs=dataclasses.asdict(wide)))
    assert look(tmp_path, many) == (many.default(TARGET), "")


def test_compile_uses_the_log_and_says_so(tmp_path: Path) -> None:
    source = model()
    tasks = {t.layers[0]: t for t in extract(source, CompileOptions())}
    assert set(tasks) == {"first", "second"}
    site = tasks["first"].site
    default: Any = site.looped(TARGET)  # type: ignore[attr-defined]
    wanted = dataclasses.replace(default, vectors=max(1, default.vectors - 1), lanes=8)
    append(tmp_path, record(site, knobs=dataclasses.asdict(wanted)))
    tuned = compile_model(source, CompileOptions(log=str(tmp_path))).manifest
    plain = compile_model(source, CompileOptions(log="none")).manifest
    layers = {layer.name: layer for layer in tuned.layers}
    assert layers["first"].kernel.endswith(f"_1x{wanted.vectors * 8}_{TARGET.isa}")
    assert layers["first"].knobs.startswith("tuned: 2.00x") and not layers["second"].knobs
    assert not any(layer.knobs for layer in plain.layers)
    assert {la.name: la.kernel for la in plain.layers}["first"] != layers["first"].kernel


def test_a_log_that_is_not_there() -> None:
    with pytest.raises(InvalidOption, match="no folder"):
        compile_model(model(), CompileOptions(log="/no/such/folder"))


def test_the_shipped_log_is_in_order() -> None:
    shipped = Log.read(log.SHIPPED)
    assert not shipped.damage
    assert all(r.kind == "best" and r.gain >= 1.0 for r in shipped.records)
    assert len(shipped.best()) == len(shipped.records)
    stale = {r.kernel for r in shipped.records if r.version != version(r.kernel, TARGETS[r.cpu])}
    assert not stale, "the code of these kernels has changed: tune again, or remove their records (skimtvm log prune)"


@pytest.mark.parametrize("images", [1, TARGET.lanes])
def test_winograd_layers_take_their_records(images: int, tmp_path: Path) -> None:
    site = winograd_site(images=images, size=30)
    wanted = list(site.space(TARGET))[-1]
    append(tmp_path, record(site, knobs=dataclasses.asdict(wanted)))
    native = WinogradWorkload(**dataclasses.asdict(site.workload), m=4)
    append(tmp_path, record(dataclasses.replace(site, workload=native), knobs=dataclasses.asdict(wanted)))
    assert not Log.read(tmp_path).damage
    assert look(tmp_path, site) == look(tmp_path, dataclasses.replace(site, workload=native))
    assert look(tmp_path, site)[0] == wanted
    assert look(tmp_path, dataclasses.replace(site, m=2, weight=site.weight[:, :, :4, :4]))[1] == ""


def test_a_network_takes_a_winograd_record(tmp_path: Path) -> None:
    source, force = model(), (("first", "winograd4"),)
    (task,) = [t for t in extract(source, CompileOptions(force=force), dense=True) if t.layers == ("first",)]
    assert task.site.name == "dense_winograd4"
    default = task.site.default(TARGET)
    wanted = next(k for k in task.site.space(TARGET) if k.rows != default.rows)
    append(tmp_path, record(task.site, knobs=dataclasses.asdict(wanted)))
    layers = {
        la.name: la for la in compile_model(source, CompileOptions(log=str(tmp_path), force=force)).manifest.layers
    }
    assert f"_{wanted.rows}x" in layers["first"].kernel and layers["first"].knobs.startswith("tuned: 2.00x")
