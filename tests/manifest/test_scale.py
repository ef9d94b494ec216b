"""Large sets: memory and time per row are bounded, and reading in pieces changes nothing that is told."""

from __future__ import annotations

import json
import pickle
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.feed.bucketing import MAX_TRIES
from ip_adapter_trainer.feed.dataset import TrainingSet
from ip_adapter_trainer.manifest import json_array
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.manifest import read_manifest
from ip_adapter_trainer.manifest.table import RowTable
from ip_adapter_trainer.storage import files
from tests.manifest.test_manifest import FAULTY_OBJECTS, OBJECTS, OK

MANY = 20_000
BROKEN = [
    "", " ", "[", "[]", "[] x", "{}", '"x"', f"[{OK}", f"[{OK},", f"[{OK},]", f"[{OK} {OK}]", f"[{OK}] ,", "[nul]",
    f"[{OK},\n\n  nul, 1]", f"[{OK},\n{OK},\n x]", "[1e5, -1.25E-7, -Infinity, 12]", "[" * 3000,
]  # fmt: skip


def many() -> list[dict[str, str]]:
    caption = "a portrait of a small blue dog in the street light, café "
    return [{"image_file": f"shard_{n // 1000:04d}/{n:09d}.jpg", "text": f"{caption}{n}"} for n in range(MANY)]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_are_read_fast_and_held_small(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in many()]
    (tmp_path / name).write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]", encoding="utf-8")
    config = ReadConfig(data_json_file=str(tmp_path / name))
    began = time.monotonic()
    read_manifest(config)
    assert time.monotonic() - began < 2, "generous: a dozen times what it takes on a quiet core"
    monkeypatch.setattr(json_array, "_WINDOW_BYTES", 2**16)
    tracemalloc.start()
    manifest = read_manifest(config)
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.rows[MANY - 1] == Row(**many()[-1])
    assert held_bytes / MANY < 180, "24 + 8 bytes and the text, with room to grow"
    assert peak_bytes < held_bytes + 1e6, "of the file a window is held, not all"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_reading_in_pieces_tells_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"

    def told(content: bytes) -> object:
        path.write_bytes(content)
        try:
            return read_manifest(ReadConfig(data_json_file=str(path)))
        except Problem as problem:
            return str(problem), problem.fault.where, problem.fault.remedy

    texts = [*BROKEN, json.dumps(OBJECTS, indent=1), json.dumps(OBJECTS, ensure_ascii=False)]
    contents = [text.encode() for text in [*texts, *(f"[{OK},\n{row},\n{OK} ]\n" for row in FAULTY_OBJECTS)]]
    contents += [b"\xef\xbb\xbf[" + OK.encode() + b"]", b"[\n" + OK.encode() + b",\n\xff]", b"[\n\n1]\n\xe2\x82"]
    whole = [told(content) for content in contents]
    monkeypatch.setattr(json_array, "_WINDOW_BYTES", size)
    pieces = [told(content) for content in contents]
    for one, other, content in zip(pieces, whole, contents, strict=True):
        if isinstance(one, tuple) or isinstance(other, tuple):
            assert one == other, content
        else:
            assert list(one.rows) == list(other.rows) and one.faults == other.faults, content  # type: ignore[attr-defined]
    assert ("is not UTF-8" in str(whole[-2])) and ", line 3" in str(whole[-2]), "the broken byte is found on its line"


ROWS = [
    Row("a.png", "", None), Row("ü/b.png", "☂" * 3, "c.png"), Row("e.png", ("", "☂", '["nul \0"]')),
    Row("f.png", ("x", "y"), "g.png"), Row("d.png", "nul \0", None),
]  # fmt: skip


def test_a_table_gives_back_its_rows() -> None:
    table = RowTable()
    assert not table
    for row in ROWS:
        table.append(row)
    for one in (table, pickle.loads(pickle.dumps(table))):
        assert list(one) == ROWS and one[-1] == ROWS[-1] and one[1:] == ROWS[1:] and len(one) == 5
    with pytest.raises(IndexError):
        table[5]


@given(st.text(alphabet="ab./\\:\0%~\n", max_size=8) | st.text(max_size=8), st.booleans())
def test_the_quick_look_at_a_name_lets_nothing_pass(name: str, allow_outside: bool) -> None:
    quick = files.refusal(name, allow_outside=allow_outside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_SUSPECT", SimpleNamespace(search=lambda _: True))
        assert files.refusal(name, allow_outside=allow_outside) == quick


@pytest.mark.parametrize("buckets", [1, 3, 400])
def test_stand_ins_are_the_next_of_the_bucket_around_the_end(buckets: int) -> None:
    numbers = (np.arange(2000) ** 2 % buckets).astype(np.int16)
    samples = SimpleNamespace(_max_tries=MAX_TRIES, bucketing=SimpleNamespace(bucket_of_row=numbers))
    for row in (0, 777, 1999):
        around = [*range(row, len(numbers)), *range(row)]
        expected = [n for n in around if numbers[n] == numbers[row]][:MAX_TRIES]
        assert list(TrainingSet._candidates(samples, row)) == expected  # type: ignore[arg-type]
