"""Tables: what was added is found under its address, and files that are no shards are refused before being read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ip_adapter_trainer.cache import shards
from ip_adapter_trainer.cache.index import IMAGES, ImageIndex, Record, name_key
from ip_adapter_trainer.cache.shards import Table, TableKind, TableWriter
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.digests import KEY_BYTES, Digests, digest, framed, places_of

KIND = TableKind("moments", (4, 2), torch.bfloat16)


def fill(root: Path, numbers: range, kind: TableKind = KIND) -> None:
    writer = TableWriter(root, kind)
    for number in numbers:
        writer.add(digest(number), torch.full(kind.shape, float(number), dtype=kind.dtype))
    writer.seal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_several_shards_are_found(tmp_path: Path, dtype: torch.dtype) -> None:
    kind = TableKind("moments", (4, 2), dtype)
    for numbers in (range(0, 30), range(30, 31), range(31, 70)):
        fill(tmp_path, numbers, kind)
    table = pickle.loads(pickle.dumps(Table(tmp_path, kind)))  # as a spawned data worker gets it
    places = table.find([digest(number) for number in range(80)])
    assert len(table) == 70 and (places[70:] == -1).all()
    rows = table.room(70)
    table.fill(rows, range(69, -1, -1), places[:70].tolist())
    for number in range(70):
        assert torch.equal(rows[69 - number], torch.full((4, 2), float(number), dtype=dtype))


def test_an_empty_table_finds_nothing(tmp_path: Path) -> None:
    assert Table(tmp_path, KIND).find([digest(1)]).tolist() == [-1]
    assert ImageIndex(tmp_path).find(["a"]) == [None]


def test_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    for number in range(6):
        fill(tmp_path, range(number, number + 1))
    table = Table(tmp_path, KIND, max_maps=2)
    for _ in range(2):
        rows = table.room(6)
        table.fill(rows, range(6), table.find([digest(number) for number in range(6)]).tolist())
        assert rows[:, 0, 0].tolist() == list(range(6))
    assert len(table._maps) == 2


def test_a_shard_is_sealed_by_size_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SEAL_BYTES", 3 * KIND.row_bytes)
    fill(tmp_path, range(7))
    assert len(list((tmp_path / KIND.folder).iterdir())) == 3
    monkeypatch.setattr(shards, "_SEAL_S", -1.0)
    fill(tmp_path, range(10, 12))
    assert len(list((tmp_path / KIND.folder).iterdir())) == 5


def test_addresses_tell_their_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") and digest(1, 2) != digest(12)
    assert len(digest("x")) == KEY_BYTES


def test_many_addresses_of_one_form_are_the_plain_ones() -> None:
    form = Digests(framed("a", 1), framed("ü", b"z"))
    assert form.of([b"", b"xy"]) == [digest("a", 1, b"", "ü", b"z"), digest("a", 1, b"xy", "ü", b"z")]


@pytest.mark.parametrize("asked", [3, 2000])
def test_addresses_are_found_at_the_first_of_their_places(asked: int) -> None:
    kept = np.sort(np.frombuffer(b"".join(digest(n % 900) for n in range(1000)), f"S{KEY_BYTES}"))
    places = places_of([digest(number) for number in range(asked)], kept)
    first = {key: place for place, key in reversed(list(enumerate(kept.tolist())))}
    assert places.tolist() == [first.get(digest(n).rstrip(b"\0"), -1) for n in range(asked)]


def header(entries: object, tail: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(tail)


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def entries(rows: object, *spans: tuple[int, int], **more: object) -> dict[str, object]:
    shapes = {"key": ("U8", [rows, 16]), "sum": ("U8", [rows, 8]), "value": ("BF16", [rows, 4, 2])}
    return {
        name: {"dtype": dtype, "shape": shape, "data_offsets": list(span)}
        for (name, (dtype, shape)), span in zip(shapes.items(), spans, strict=True)
    } | more


ONE = (0, 16), (16, 24), (24, 40)  # where the tensors of one row are

HOSTILE = {
    "empty": b"",
    "no header": b"\xff" * 8,
    "endless header": (1 << 62).to_bytes(8, "little") + b"{",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "nested": (3000).to_bytes(8, "little") + b"[" * 3000,
    "an array": header([1], 0),
    "more rows than bytes": header(entries(10**15, *ONE), 40),
    "negative rows": header(entries(-1, (0, -16), (-16, -24), (-24, -40)), 40),
    "no rows": header(entries(0, (0, 0), (0, 0), (0, 0)), 0),
    "rows true": header(entries(True, *ONE), 40),
    "overlap": header(entries(1, (0, 16), (0, 8), (24, 40)), 40),
    "a gap": header(entries(1, (0, 16), (17, 25), (25, 41)), 40),
    "outside": header(entries(1, (0, 16), (16, 24), (1000, 1016)), 40),
    "fourth tensor": header(entries(1, *ONE, more=tensor("U8", [0], 40, 40)), 40),
    "other shape": header(entries(1, *ONE, value=tensor("BF16", [1, 8], 24, 40)), 40),
    "other dtype": header(entries(1, *ONE, value=tensor("F16", [1, 4, 2], 24, 40)), 40),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, range(3))
    (tmp_path / KIND.folder / "x.safetensors").write_bytes(content)
    with pytest.raises(Problem, match=r"no whole shard[^$]*x\.safetensors[^$]*prepare"):
        Table(tmp_path, KIND)


def test_the_hostile_frame_itself_is_sound(tmp_path: Path) -> None:
    (tmp_path / KIND.folder).mkdir(parents=True)
    (tmp_path / KIND.folder / "x.safetensors").write_bytes(header(entries(1, (24, 40), (0, 8), (8, 24)), 40))
    assert len(Table(tmp_path, KIND)) == 1


def test_a_shard_without_checksums_is_told_apart(tmp_path: Path) -> None:
    old = {"key": tensor("U8", [1, 16], 0, 16), "value": tensor("BF16", [1, 4, 2], 16, 32)}
    (tmp_path / KIND.folder).mkdir(parents=True)
    (tmp_path / KIND.folder / "x.safetensors").write_bytes(header(old, 32))
    with pytest.raises(Problem, match=r"no checksums: an earlier version[^$]*x\.safetensors[^$]*prepare"):
        Table(tmp_path, KIND)


@pytest.mark.parametrize("shape", [(4, 2), (3,), (5, 1)])
def test_any_bit_that_flips_on_the_disk_is_found(tmp_path: Path, shape: tuple[int, ...]) -> None:
    kind = TableKind("moments", shape, torch.bfloat16)
    fill(tmp_path, range(1, 4), kind)
    file = next((tmp_path / kind.folder).iterdir())
    sound = file.read_bytes()
    values = (
        8
        + int.from_bytes(sound[:8], "little")
        + json.loads(sound[8:].split(b"}}")[0] + b"}}")["value"]["data_offsets"][0]
    )
    table = Table(tmp_path, kind)
    places, rows = table.find([digest(number) for number in (1, 2, 3)]).tolist(), table.room(3)
    assert table.fill(rows, [0, 2], [places[0], places[2]]) == []
    for bit in range(8 * kind.value_bytes):
        flipped = bytearray(sound)
        flipped[values + kind.value_bytes + bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert table.fill(rows, range(3), places) == [places[1]], "the second row that was written"
    assert table.file_of(places[1]) == file


def test_damaged_records_of_pictures_are_refused(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, IMAGES)
    writer.add(name_key("a"), Record(1, 2, 3, (4, 5), b"c" * 16).packed())
    writer.seal()
    file = next((tmp_path / IMAGES.folder).iterdir())
    file.write_bytes(file.read_bytes().replace(b"c" * 16, b"d" * 16))
    with pytest.raises(Problem, match="not what was written"):
        ImageIndex(tmp_path)


def test_a_torn_shard_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    file = next((tmp_path / KIND.folder).iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Problem, match="no whole shard"):
        Table(tmp_path, KIND)


def test_of_several_records_the_newest_counts(tmp_path: Path) -> None:
    for noted, side in ((5, 50), (9, 90), (7, 70)):
        writer = TableWriter(tmp_path, IMAGES)
        writer.add(name_key("a"), Record(1, 2, noted, (side, 3), b"c" * 16).packed())
        writer.seal()
    assert ImageIndex(tmp_path).find(["b", "a"]) == [None, Record(1, 2, 9, (90, 3), b"c" * 16)]
