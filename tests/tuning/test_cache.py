"""The files of tuned plans: what is written comes back, the nearest in the first folder counts, nothing broken does harm."""

import dataclasses
import json
import os
import warnings
import zipfile
from pathlib import Path

import pytest

from moe_jax import MoEConfig
from moe_jax.tuning import cache, schema
from moe_jax.tuning.cache import TuningWarning, find_tuned
from moe_jax.tuning.plan import LayerShape, default_plan, plan_for
from tests.tuning.plans import FEW, MANY, entry_of, pairs

ROOT = Path(__file__).parents[2]
NAME = "cpu.json"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(cache, "device_kind", lambda: "cpu")


def band_of(shape):
    found = find_tuned(shape)
    return None if found is None else found.plan.up.band


def test_what_is_saved_is_found(folders):
    entry = entry_of()
    path = cache.save(folders[0], entry)
    assert path == folders[0] / NAME
    assert find_tuned(MANY) == (entry.shape, entry.plan, path)
    assert cache.stored(folders[0], MANY) == entry
    assert plan_for(MANY) == entry.plan != default_plan(MANY)
    head = json.loads(path.read_text())
    assert head["version"] == schema.VERSION and head["device"] == "cpu"
    assert {"jax", "date"} <= head.keys()
    assert [p.name for p in folders[0].iterdir()] == [NAME], "no unfinished file stays behind"


def test_a_second_entry_joins_the_first_and_a_new_one_takes_the_place_of_the_old(folders):
    for entry in (entry_of(MANY, 5), entry_of(FEW, 6), entry_of(MANY, 7)):
        path = cache.save(folders[0], entry)
    assert (band_of(MANY), band_of(FEW)) == (7, 6)
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_the_first_folder_counts_even_if_a_later_one_is_nearer(folders):
    for folder, band in zip(reversed(folders), (1, 2, 3), strict=True):
        cache.save(folder, entry_of(MANY if band < 3 else pairs(MANY, 40000), band))
        assert band_of(MANY) == band
    assert band_of(pairs(MANY, 16384)) == 2, "40000 pairs are too far off, the next folder is asked"


def test_without_the_variable_the_users_cache_comes_first(folders, monkeypatch):
    monkeypatch.delenv("MOE_JAX_TUNED_DIR")
    assert cache.folders() == folders[1:]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.user_folder() == Path("/home/someone/.cache/moe_jax")


def test_the_nearest_size_within_a_factor_of_two(folders):
    for num_pairs, band in ((1000, 1), (4000, 4), (6000, 6)):
        cache.save(folders[0], entry_of(pairs(MANY, num_pairs), band))
    asked = {499: None, 500: 1, 1999: 1, 2000: 1, 2001: 4, 4800: 4, 4950: 6, 12000: 6, 12001: None, 0: None}
    assert {num_pairs: band_of(pairs(MANY, num_pairs)) for num_pairs in asked} == asked


@pytest.mark.parametrize(
    "change",
    [
        {"num_local_experts": 64},
        {"hidden_size": 4096},
        {"intermediate_size": 1536},
        {"gated": False},
        {"dtype": "float16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_problem_has_no_part_in_it(folders, change):
    cache.save(folders[0], entry_of())
    assert find_tuned(dataclasses.replace(MANY, **change)) is None


def test_each_number_format_has_plans_of_its_own(folders):
    config = MoEConfig(128, 8, 2048, 768)
    formats = None, "fp8_block", "fp8_channel", "fp8_weight_channel", "int8_channel", "int4_group64"
    shapes = [LayerShape.of(dataclasses.replace(config, quantization=name), 4096) for name in formats]
    assert len(set(shapes)) == len(shapes) and shapes[0] == MANY
    for band, shape in enumerate(shapes[1:], 1):
        assert find_tuned(shape) is None
        cache.save(folders[0], entry_of(shape, band))
    assert [band_of(shape) for shape in shapes] == [None, 1, 2, 3, 4, 5]
    assert cache.stored(folders[0], shapes[3]).plan == plan_for(shapes[3])
    # Codes and scales of blocks are the same to the kernels, whatever the dtype of the scales.
    assert LayerShape.of(dataclasses.replace(config, quantization="fp8_block_ue8m0"), 4096) == shapes[1]


def test_files_are_read_once_until_forgotten(folders):
    path = cache.save(folders[0], entry_of())
    assert band_of(MANY) == 5
    path.write_text(path.read_text().replace('"band": 5', '"band": 9'))
    assert band_of(MANY) == 5
    cache.forget()
    assert band_of(MANY) == 9


def spoil_entry(spoil):
    """A change to the last entry of the file."""

    def change(text):
        whole = json.loads(text)
        spoil(whole["entries"][-1])
        return json.dumps(whole)

    return change


BROKEN = {
    "not JSON": (lambda text: text[:-20], "not JSON"),
    "no object": (lambda text: "[]", "not an object"),
    "no entries": (lambda text: '{"version": 1}', "list of entries"),
    "another version": (lambda text: text.replace('"version": 1', '"version": 2'), "version 2 is not 1"),
    "not text": (lambda text: b"\xff\xfe\x00", "not JSON"),
}
BAD_ENTRIES = {
    "an unknown field": (lambda e: e["plan"]["up"].update(warp=3), "no field warp"),
    "an unknown size": (lambda e: e["shape"].update(top_k=3), "no field top_k"),
    "a missing part": (lambda e: e["plan"].pop("down"), "lacks down"),
    "a missing size": (lambda e: e["shape"].pop("gated"), "lacks gated"),
    "a word": (lambda e: e["plan"]["up"].update(stages="four"), "stages='four'"),
    "a fraction": (lambda e: e["plan"]["up"].update(stages=2.5), "stages=2.5"),
    "truth": (lambda e: e["plan"]["up"].update(stages=True), "stages=True"),
    "no counts": (lambda e: e["plan"]["up"].update(row_counts=[]), "row_counts"),
    "no object": (lambda e: e.update(plan=3), "not an object"),
    "too much memory": (lambda e: e["plan"]["up"].update(stages=5), "shared memory"),
    "a lone half": (lambda e: e["plan"]["up"].update(halves=1), "halves=1"),
    "another row tile": (lambda e: e["plan"]["up"].update(row_counts=[64]), "tile_rows=64"),
    "a size for other kernels": (lambda e: e["shape"].update(hidden_size=1000), "1000"),
    "no number format": (lambda e: e["shape"].update(codes="float9_e9 block"), "float9_e9"),
    "a plan for 16 bits": (lambda e: e["shape"].update(codes="float8_e4m3fn block"), "at most 96"),
    "words without meaning": (lambda e: e["shape"].update(codes="weights"), "codes='weights'"),
    "no pairs": (lambda e: e["shape"].update(num_pairs=0), "0 pairs"),
}


@pytest.mark.parametrize("name", BROKEN | BAD_ENTRIES)
def test_what_cannot_be_used_is_said_once_and_the_rule_stands_in(folders, name):
    path = cache.save(folders[0], entry_of())
    change, words = BROKEN[name] if name in BROKEN else (spoil_entry(BAD_ENTRIES[name][0]), BAD_ENTRIES[name][1])
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    cache.forget()
    with pytest.warns(TuningWarning) as caught:
        assert plan_for(MANY) == default_plan(MANY)
    (warning,) = caught
    for word in (str(path), words, "moe-jax tune", "default rule"):
        assert word in str(warning.message), str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_for(MANY) == default_plan(MANY)


def test_a_bad_entry_does_not_take_the_good_ones_with_it(folders):
    cache.save(folders[0], entry_of(FEW, 6))
    path = cache.save(folders[0], entry_of(MANY))
    path.write_text(spoil_entry(BAD_ENTRIES["an unknown field"][0])(path.read_text()))
    cache.forget()
    with pytest.warns(TuningWarning, match="entry 1"):
        assert (band_of(FEW), band_of(MANY)) == (6, None)
    cache.save(folders[0], entry_of(pairs(FEW, 7), 7))
    assert len(json.loads(path.read_text())["entries"]) == 3, "what this version cannot use is not thrown away"


def test_a_field_that_came_later_may_be_missing(folders):
    path = cache.save(folders[0], entry_of())
    path.write_text(spoil_entry(lambda e: e["plan"]["up"].pop("cluster"))(path.read_text()))
    cache.forget()
    assert find_tuned(MANY).plan == entry_of().plan


def test_nothing_is_added_to_a_broken_file(folders):
    path = cache.save(folders[0], entry_of())
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot add to .*not JSON.*another folder"):
        cache.check_writable(folders[0])
    with pytest.raises(ValueError, match="not JSON"):
        cache.save(folders[0], entry_of())
    assert path.read_text() == "{"


def test_a_write_that_fails_leaves_the_old_file(folders, monkeypatch):
    path = cache.save(folders[0], entry_of())
    before = path.read_text()

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        cache.save(folders[0], entry_of(FEW))
    assert path.read_text() == before
    assert [p.name for p in folders[0].iterdir()] == [NAME]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the folder"):
        cache.check_writable(tmp_path / "file" / "folder")


def test_the_files_that_ship_can_be_used_and_are_in_the_wheel(tmp_path):
    shipped = sorted((ROOT / "moe_jax" / "tuning" / "configs").glob("*.json"))
    assert "nvidia_h200.json" in [path.name for path in shipped]
    for path in shipped:
        whole = json.loads(path.read_text())
        assert {"version", "device", "jax", "date", "entries"} <= whole.keys()
        assert cache.file_name(whole["device"]) == path.name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(cache.read(path)) == len(whole["entries"])
    builder = pytest.importorskip("hatchling.builders.wheel")
    wheel = next(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        assert {path.relative_to(ROOT).as_posix() for path in shipped} <= set(archive.namelist())
