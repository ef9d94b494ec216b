"""No name in a data file leads out of its root, and only files are opened."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.storage.files import NotRegularError, open_regular, refusal, safe_join, stat_plain

POSIX = pytest.mark.skipif(os.name != "posix", reason="spellings of POSIX")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(b"x")
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.png").write_bytes(b"a")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root" / "sub")
    (tmp_path / "root" / "round").symlink_to(tmp_path / "root" / "round")
    return (tmp_path / "root").resolve()


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "in/a.png", "sub//a.png", "..a", "a..b", "~", "c:x"])
def test_names_under_the_root_are_found(root: Path, name: str) -> None:
    assert safe_join(root, name).is_relative_to(root)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty"), ("a\0b", "NUL"), ("https://a.b/c.png", "URL"), ("file:///etc/passwd", "URL"),
        ("data:image/png;base64,AA", "URL"), ("/etc/passwd", "absolute"), ("../outside/secret.png", r"'\.\.'"),
        ("sub/../../outside/secret.png", r"'\.\.'"), ("sub/..", r"'\.\.'"), ("out/secret.png", "link"),
        ("\ud800.png", "no file can"),
        pytest.param("sub\\a.png", "backslash", marks=POSIX), pytest.param("..\\..\\x", "backslash", marks=POSIX),
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(root: Path, name: str, words: str) -> None:
    with pytest.raises(Problem, match=words) as caught:
        safe_join(root, name)
    assert caught.value.fault.remedy


def test_the_flag_lets_out_but_fetches_nothing(root: Path) -> None:
    secret = root.parent / "outside" / "secret.png"
    for name in ("out/secret.png", "../outside/secret.png", str(secret)):
        assert safe_join(root, name, allow_outside=True) == secret
    for name in ("https://a.b/c.png", "a\0b", ""):
        assert refusal(name, allow_outside=True)


def test_ten_thousand_strings_and_no_escape(root: Path) -> None:
    chance = random.Random(0)
    pieces = ["..", ".", "/", "//", "\\", "sub", "out", "in", "round", "a.png", "secret.png", "outside", "\0", "~",
              "%2e", "C:", "http:", "\u2024", "..;", " ", "\n", "etc", "proc/self/root", str(root.parent)]  # fmt: skip
    taken = 0
    for _ in range(10_000):
        name = "".join(chance.choice(pieces) for _ in range(chance.randint(1, 7)))
        try:
            path = safe_join(root, name)
        except Problem:
            continue
        taken += 1
        assert Path(os.path.realpath(path)).is_relative_to(root), name
    assert taken > 500


def test_only_files_are_opened(root: Path) -> None:
    with open_regular(root / "sub" / "a.png") as stream:
        assert stream.read() == b"a"
    with pytest.raises(NotRegularError):
        open_regular(root / "sub")
    with pytest.raises(FileNotFoundError):
        open_regular(root / "none")


def test_the_quick_stat_tells_of_plain_files_what_the_careful_one_does(root: Path) -> None:
    for name in ("sub/a.png", "./sub/a.png", "sub//a.png", "sub"):
        assert stat_plain(root, name) == safe_join(root, name).stat()


@pytest.mark.parametrize("name", [
    "in/a.png", "in", "out/secret.png", "out", "round", "round/x", "../outside/secret.png", "/etc/passwd", "none.png",
    "sub/a.png/x", "", "n" * 4000, "\ud800.png",
])  # fmt: skip
def test_the_quick_stat_leaves_all_else_to_the_careful_one(root: Path, name: str) -> None:
    assert stat_plain(root, name) is None
