"""Every form of manifest, every fault of a row, and what cannot be read at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.values import Row
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.entries import MAX_LINE_BYTES
from ip_adapter_trainer.manifest.folder import MAX_CAPTION_BYTES
from ip_adapter_trainer.manifest.json_array import read_array
from ip_adapter_trainer.manifest.manifest import Manifest, read_manifest

ROWS = [Row("a.png", "one"), Row("sub/b.png", ""), Row("c.png", 'th"r,ee\nünï', "d.png")]
OBJECTS = [
    {"image_file": "a.png", "text": "one", "width": 3},
    {"image_file": "sub/b.png", "text": "", "prompt_image_file": None},
    {"text": 'th"r,ee\nünï', "image_file": "c.png", "prompt_image_file": "d.png"},
]
GOLDEN = "0d95c597bac3c78c73912d5bd6c583ad1f3eb657cda0128c129fb5efd8a2bbca"  # fingerprint of the objects
CSV = 'image_file,text,prompt_image_file,width\na.png,one,,3\nsub/b.png,,,\nc.png,"th""r,ee\nünï",d.png,\n'


def _read(path: Path, content: str | bytes | None = None, **settings: Any) -> Manifest:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_manifest(ReadConfig(data_json_file=str(path), **settings))


def _jsonl(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in objects)


FORMS: dict[str, tuple[str, str | bytes]] = {
    "json": ("data.json", json.dumps(OBJECTS, indent=1)),
    "json with BOM": ("data.JSON", b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode()),
    "jsonl": ("data.jsonl", _jsonl(OBJECTS)),
    "jsonl with BOM, blank lines and CRLF": (
        "data.jsonl",
        b"\xef\xbb\xbf" + _jsonl(OBJECTS).replace("\n", "\r\n \r\n").encode(),
    ),
    "csv": ("data.csv", CSV),
    "csv with BOM": ("data.csv", b"\xef\xbb\xbf" + CSV.encode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_give_the_same_rows(form: str, tmp_path: Path) -> None:
    name, content = FORMS[form]
    manifest = _read(tmp_path / name, content)
    assert list(manifest.rows) == ROWS and not manifest.faults and manifest.root == tmp_path.resolve()
    other = _read(tmp_path / "other.json", json.dumps(OBJECTS)).fingerprint
    assert manifest.fingerprint.to_json() == other.to_json()
    assert manifest.unread_columns == ("width",)


def test_a_folder_with_captions(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, caption in {"b.JPG": "two", "a.png": " one\n", "sub/c.webp": "\ufeffthree", ".hid.png": "x"}.items():
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    (tmp_path / "notes.md").touch()
    assert list(_read(tmp_path).rows) == [Row("a.png", "one"), Row("b.JPG", "two"), Row("sub/c.webp", "three")]
    assert _read(tmp_path).where(2) == f"{tmp_path.name}, picture 3 (sub/c.webp)"


def test_a_folder_whose_captions_are_missing_long_or_broken(tmp_path: Path) -> None:
    captions = {"a": None, "b": b"x" * (MAX_CAPTION_BYTES + 1), "c": b"\xff", "d": b""}
    for name, caption in captions.items():
        (tmp_path / f"{name}.png").touch()
        if caption is not None:
            (tmp_path / f"{name}.txt").write_bytes(caption)
    (tmp_path / "e.png").touch()
    (tmp_path / "e.txt").mkdir()
    manifest = _read(tmp_path)
    assert list(manifest.rows) == [Row("d.png", "")] and manifest.entries == 5
    assert [f.kind for f in manifest.faults] == ["missing_caption", "line_too_long", "bad_text", "unreadable"]
    assert manifest.faults[0].where == f"{tmp_path.name}, picture 1 (a.png)"


@pytest.mark.parametrize("key", ["file_name", "image_file"])
def test_a_folder_with_metadata(key: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(_jsonl([{key: "a.png", "text": "one"}, {key: "b.png"}]))
    manifest = _read(tmp_path)
    assert list(manifest.rows) == [Row("a.png", "one")] and manifest.where(0) == "metadata.jsonl, line 1 (a.png)"
    assert [f.where for f in manifest.faults] == ["metadata.jsonl, line 2"]


def test_columns_and_root_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    content = json.dumps([{"file": "a.png", "caption": "one", "reference": "b.png"}])
    columns = {"image_column": "file", "text_column": "caption", "prompt_image_column": "reference"}
    manifest = _read(tmp_path / "data.json", content, data_root_path=str(tmp_path / "pictures"), **columns)
    assert list(manifest.rows) == [Row("a.png", "one", "b.png")]
    assert manifest.root == (tmp_path / "pictures").resolve()


OK = '{"image_file": "ok.png", "text": "ok"}'
FAULTY_OBJECTS: dict[str, tuple[str, str]] = {
    '{"image_file": "a.png", "txt": "x"}': ("missing_column", "did you mean your 'txt'"),
    '{"image": "a.png", "text": "x"}': ("missing_column", "--image_column"),
    '{"image_file": "a.png"}': ("missing_column", "may be empty"),
    '{"image_file": 7, "text": "x"}': ("wrong_type", "a number"),
    '{"image_file": ["a.png"], "text": "x"}': ("wrong_type", "an array, not a string; write the path of one picture"),
    '{"image_file": null, "text": "x"}': ("wrong_type", "null, not a string; write the path of one picture"),
    '{"image_file": "a.png", "text": true}': ("wrong_type", 'true or false, not a string; write the caption in quotes'),
    '{"image_file": "a.png", "text": 3}': ("wrong_type", 'or "" if there is none'),
    '{"image_file": "a.png", "text": []}': ("wrong_type", 'an empty array; write ""'),
    '{"image_file": "a.png", "text": ["x", 3]}': ("wrong_type", "an array that holds a number; write each"),
    '{"image_file": "a.png", "text": ["x", ["y"]]}': ("wrong_type", "an array that holds an array"),
    '{"image_file": "a.png", "text": ["x", "\\ud800"]}': ("bad_text", "'text'"),
    '{"image_file": "a.png", "text": "x", "prompt_image_file": {}}': ("wrong_type", "an object"),
    '{"image_file": "a.png", "text": "x", "prompt_image": "b.png"}': ("unknown_column", "prompt_image_file"),
    '{"image_file": "a.png", "text": "x", "score": NaN}': ("not_json", "NaN"),
    '{"image_file": "a.png", "text": "x", "score": [-Infinity]}': ("not_json", "-Infinity"),
    '{"image_file": "a.png", "text": "x", "text": "y"}': ("duplicate_key", "'text'"),
    '{"image_file": "a.png", "text": "x", "more": {"k": 1, "k": 1}}': ("duplicate_key", "'k'"),
    '{"image_file": "a.png", "text": "\\ud800"}': ("bad_text", "'text'"),
    '{"image_file": "../a.png", "text": "x"}': ("unsafe_path", "'..'"),
    '{"image_file": "a.png", "text": "x", "prompt_image_file": "/b.png"}': ("unsafe_path", "'prompt_image_file'"),
    '{"image_file": "http://a.b/c.png", "text": "x"}': ("unsafe_path", "URL"),
    '{"image_file": "", "text": "x"}': ("unsafe_path", "empty"),
    '["a.png", "x"]': ("wrong_type", "an array"),
    '"a.png"': ("wrong_type", "a string"),
    "null": ("wrong_type", "null"),
}  # fmt: skip
FAULTY_LINES: dict[str | bytes, tuple[str, str]] = {
    '{"image_file": "a.png", "text": "x"': ("not_json", "column"),
    '{"image_file": "a.png"} {"text": "x"}': ("not_json", "Text after"),
    "image_file: a.png": ("not_json", "Expecting value"),
    "[" * 100_000: ("not_json", "Nested too deeply"),
    '{"image_file": "a.png", "text": "x", "n": ' + "9" * 100_000 + "x}": ("not_json", "delimiter"),
    '{"text": "' + "x" * MAX_LINE_BYTES + '"}': ("line_too_long", "1 MB"),
    b'{"image_file": "a.png", "text": "\xff"}': ("bad_text", "byte 34"),
}


@pytest.mark.parametrize("broken", FAULTY_OBJECTS)
def test_a_faulty_row_costs_itself_only(broken: str, tmp_path: Path) -> None:
    kind, words = FAULTY_OBJECTS[broken]
    array = _read(tmp_path / "data.json", f"[{OK},\n{broken},\n{OK}]")
    lines = _read(tmp_path / "data.jsonl", f"{OK}\n{broken}\n{OK}\n")
    for manifest, where in ((array, "data.json, element 2 (line 2)"), (lines, "data.jsonl, line 2")):
        assert len(manifest.rows) == 2 and manifest.entries == 3
        (fault, *_) = manifest.faults
        assert (fault.kind, fault.where) == (kind, where)
        assert words in f"{fault.what}; {fault.remedy}" and fault.remedy and "\n" not in str(fault)


@pytest.mark.parametrize("broken", FAULTY_LINES, ids=range(len(FAULTY_LINES)))
def test_a_faulty_line_costs_itself_only(broken: str | bytes, tmp_path: Path) -> None:
    kind, words = FAULTY_LINES[broken]
    line = broken if isinstance(broken, bytes) else broken.encode()
    manifest = _read(tmp_path / "data.jsonl", b"%b\n%b\n%b" % (OK.encode(), line, OK.encode()))
    assert len(manifest.rows) == 2 and [f.kind for f in manifest.faults] == [kind]
    assert words in manifest.faults[0].what and manifest.faults[0].where == "data.jsonl, line 2"


@pytest.mark.parametrize(
    ("line", "kind"),
    [("a.png", "not_csv"), ("a.png,x,y", "not_csv"), ('"a.png"x,y', "not_csv"), ("/a.png,x", "unsafe_path"),
     (",x", "unsafe_path"), ("a.png," + "x" * 200_000, "not_csv"), (b"a.png,\xff", "bad_text"),
     ("a\0.png,x", "unsafe_path")],
    ids=range(8),
)  # fmt: skip
def test_a_faulty_line_of_a_table_costs_itself_only(line: str | bytes, kind: str, tmp_path: Path) -> None:
    broken = line if isinstance(line, bytes) else line.encode()
    manifest = _read(tmp_path / "data.csv", b'image_file,text\n"ok.png","o\nk"\n%b\nok.png,ok\n' % broken)
    assert len(manifest.rows) == 2 and [(f.kind, f.where) for f in manifest.faults] == [(kind, "data.csv, line 4")]


@pytest.mark.parametrize(("value", "text"), [
    ('"x"', "x"), ("null", ""), ("[null]", ""), ('["x"]', "x"), ('["x", null, "x"]', ("x", "", "x")),
    ('["[\\"x\\"]", "\\u0000 ü\\n"]', ('["x"]', "\0 ü\n")), ('"[\\"x\\", \\"y\\"]"', '["x", "y"]'),
], ids=range(7))  # fmt: skip
def test_a_caption_may_be_null_or_a_list(value: str, text: str | tuple[str, ...], tmp_path: Path) -> None:
    row = f'{{"image_file": "a.png", "text": {value}, "prompt_image_file": "b.png"}}'
    for name, content in (("data.json", f"[{OK}, {row}, {OK}]"), ("data.jsonl", f"{OK}\n{row}\n{OK}")):
        manifest = _read(tmp_path / name, content)
        assert list(manifest.rows) == [Row("ok.png", "ok"), Row("a.png", text, "b.png"), Row("ok.png", "ok")]
        assert not manifest.faults


def test_an_open_quote_is_a_fault_at_its_line(tmp_path: Path) -> None:
    manifest = _read(tmp_path / "data.csv", 'image_file,text\na.png,x\nb.png,"y\nc.png,z\n')
    assert len(manifest.rows) == 1 and manifest.faults[0].where == "data.csv, line 3"


def test_several_faults_of_a_row_are_one_faulty_row(tmp_path: Path) -> None:
    manifest = _read(tmp_path / "data.jsonl", f'{OK}\n{{"image_file": 3, "text": 4}}\n')
    assert len(manifest.faults) == 2 and manifest.entries == 2


UNREADABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("data.json", lambda path: None, "no such manifest"),
    "suffix": ("data.xml", lambda path: path.write_text("<a/>"), ".jsonl"),
    "empty": ("data.json", lambda path: path.write_text(""), "not a JSON array"),
    "no rows": ("data.json", lambda path: path.write_text(" [ ] "), "no rows"),
    "no lines": ("data.jsonl", lambda path: path.write_text("\n\n"), "no rows"),
    "an object": ("data.json", lambda path: path.write_text(OK), "a .jsonl file"),
    "cut short": ("data.json", lambda path: path.write_text(f"[{OK},\n{OK}"), "line 2, column 39"),
    "comma at the end": ("data.json", lambda path: path.write_text(f"[{OK},]"), "Expecting value"),
    "no comma": ("data.json", lambda path: path.write_text(f"[{OK}{OK}]"), "Expecting ','"),
    "more after": ("data.json", lambda path: path.write_text(f"[{OK}]{OK}"), "Text after"),
    "deep": ("data.json", lambda path: path.write_text("[" * 100_000), "Nested too deeply"),
    "not UTF-8": ("data.json", lambda path: path.write_bytes(b'["\xff"]'), "not UTF-8"),
    "UTF-16": ("data.csv", lambda path: path.write_text("image_file,text\n", encoding="utf-16"), "UTF-16"),
    "no columns": ("data.csv", lambda path: path.write_text(""), "'image_file' is missing"),
    "wrong columns": ("data.csv", lambda path: path.write_text("image_file,txt\n"), "did you mean your 'txt'"),
    "near column": ("data.csv", lambda path: path.write_text("image_file,text,prompt_image\n"), "prompt_image_file"),
    "column twice": ("data.csv", lambda path: path.write_text("image_file,text,text\n"), "twice"),
    "broken header": ("data.csv", lambda path: path.write_text('"image_file"x,text\n'), "header"),
    "endless line": ("data.csv", lambda path: path.write_text("image_file,text\n" + "x" * 2**21), "longer"),
    "empty folder": ("data", lambda path: path.mkdir(), "no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_at_all_is_a_problem(name: str, tmp_path: Path) -> None:
    file, make, words = UNREADABLE[name]
    make(tmp_path / file)
    with pytest.raises(Problem) as caught:
        _read(tmp_path / file)
    assert (
        words in str(caught.value)
        and caught.value.fault.where
        and caught.value.fault.remedy
        and caught.value.exit_code == 2
    )


@pytest.mark.parametrize("start", [b"", b"[{tru", b'["'])
def test_an_array_is_given_up_soon(start: bytes, tmp_path: Path) -> None:
    filler = b"x" if start else b" "
    (tmp_path / "data.json").write_bytes(start + filler * 2**24)
    with (tmp_path / "data.json").open("rb") as stream:
        with pytest.raises(Problem):
            list(read_array(tmp_path / "data.json", stream))
        assert stream.tell() <= 2**23


def test_a_missing_root_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="--data_root_path"):
        _read(tmp_path / "data.json", f"[{OK}]", data_root_path=str(tmp_path / "none"))


def test_the_fingerprint_of_single_captions_is_what_older_checkpoints_hold(tmp_path: Path) -> None:
    assert _read(tmp_path / "data.json", json.dumps(OBJECTS)).fingerprint.sha256 == GOLDEN


def test_the_fingerprint_knows_every_field_and_the_order(tmp_path: Path) -> None:
    changed = [
        OBJECTS,
        OBJECTS[::-1],
        OBJECTS[:2],
        *([{**OBJECTS[0], k: "z"}, *OBJECTS[1:]] for k in ("text", "image_file")),
        *([{**OBJECTS[0], "text": t}, *OBJECTS[1:]] for t in (["a", "b"], ["b", "a"], '["a", "b"]')),
    ]
    prints = {_read(tmp_path / "data.json", json.dumps(objects)).fingerprint.sha256 for objects in changed}
    assert len(prints) == len(changed) and all(len(p) == 64 for p in prints)


def test_outside_the_root_only_by_flag(tmp_path: Path) -> None:
    content = json.dumps([{"image_file": "/pictures/a.png", "text": ""}, {"image_file": "../b.png", "text": ""}])
    assert len(_read(tmp_path / "data.json", content).faults) == 2
    assert len(_read(tmp_path / "data.json", content, allow_outside_root=True).rows) == 2
