"""Names of pictures by every spelling that leads elsewhere, and the tree of decoys that they lead to."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.corpus.files import encoded
from faults.corpus.pictures import RGB

INSIDE, SECRET = encoded(RGB, "PNG"), encoded(RGB[::-1], "PNG")  # both are sound: an escape would be read


@dataclass(frozen=True)
class NameCase:
    """A name for a picture and the faults that it may be; none if it must be read."""

    name: str
    kinds: tuple[str, ...] = ()


def write_files(folder: Path) -> Path:
    """A root with links, a pipe, a socket and folders in it, and decoys beside it.

    Returns:
        The root.
    """
    root, outside = folder / "root", folder / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for name in (
        "ok.png",
        "sub/a.png",
        "ünï 画像.png",
        "a\nb.png",
        "~",
        "%2e%2e",
        "C:x.png",
        "..a.png",
        "a..png",
        "-rf.png",
    ):
        (root / name).write_bytes(INSIDE)
    for decoy in (outside / "secret.png", folder / "secret.png", folder / "root.png"):
        decoy.write_bytes(SECRET)
    links = {
        "in": root / "sub", "in.png": root / "ok.png", "out": outside, "out.png": outside / "secret.png",
        "up": Path(".."), "chain": Path("out"), "round": Path("round"), "none.png": root / "gone.png", "top": Path("/"),
        "zero.png": Path("/dev/zero"), "self": Path("/proc/self"),
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    _leave_socket(root, "socket.png")
    return root


def write_captions(folder: Path) -> list[NameCase]:
    """A folder of pictures with captions beside them, some of which are none or lie elsewhere, and a decoy beside it.

    Returns:
        The pictures in the order of their names, with the faults that they must be.
    """
    decoy = folder.parent / "secret.txt"
    decoy.write_text("not to be read")
    out, none = ("unsafe_path",), ("missing_caption",)
    texts: list[tuple[str, bytes, tuple[str, ...]]] = [
        ("a ok", b" a caption\n", ()), ("b BOM", b"\xef\xbb\xbfa caption", ()), ("c empty", b"", ()),
        ("d long", b"x" * 70_000, ("line_too_long",)), ("e Latin-1", b"\xe9", ("bad_text",)), ("f\nline", b"x", ()),
        ("g \x1b[2J", b"\xff", ("bad_text",)), (os.fsdecode(b"h \xff"), b"x", ("bad_text",)),
    ]  # fmt: skip
    links: list[tuple[str, Path, tuple[str, ...]]] = [
        ("m inside", Path("a ok.txt"), ()), ("n outside", decoy, out), ("o up", Path("../secret.txt"), out),
        ("p zero", Path("/dev/zero"), out), ("q gone", Path("gone.txt"), none), ("r round", Path("r round.txt"), out),
    ]  # fmt: skip
    for name, text, _ in texts:
        (folder / f"{name}.txt").write_bytes(text)
    for name, target, _ in links:
        (folder / f"{name}.txt").symlink_to(target)
    os.mkfifo(folder / "s pipe.txt")
    (folder / "t folder.txt").mkdir()
    listed = [NameCase(name, kinds) for name, _, kinds in (*texts, *links)]
    listed += [NameCase(name, ("unreadable",)) for name in ("s pipe", "t folder")] + [NameCase("u none", none)]
    for case in listed:
        (folder / f"{case.name}.png").write_bytes(INSIDE)
    return listed


def _leave_socket(root: Path, name: str) -> None:
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(root)  # the path of a socket may be no longer than 108 bytes
        server.bind(name)
        os.chdir(before)


def cases(root: Path) -> list[NameCase]:
    """Names under a root that `write_files` wrote, with their verdicts."""
    out, none, no_file, unreadable = ("unsafe_path",), ("missing_file",), ("not_a_file",), ("unreadable",)
    secret = root.parent / "outside" / "secret.png"
    read = ["ok.png", "./ok.png", "sub/a.png", "sub//a.png", "sub/./a.png", "in/a.png", "in.png", "ünï 画像.png",
    "a\nb.png",
            "~", "%2e%2e", "C:x.png", "..a.png", "a..png", "-rf.png"]  # fmt: skip
    refused = [
        "", "..", "../secret.png", "../outside/secret.png", "sub/../../secret.png", "sub/../ok.png", "./../secret.png",
        "sub/..", "in/../ok.png", str(secret), f"/{secret}", "/etc/passwd", "//server/share/a.png", "..\\secret.png",
        "sub\\a.png", "\\\\server\\share\\a.png", "C:\\a.png", "C:/a.png", "\\\\?\\C:\\a.png", "out/secret.png",
        "out.png",
        "chain/secret.png", "up/secret.png", "up/root/../secret.png", "top/etc/passwd", "zero.png", "self/environ",
        "self/root/etc/passwd", "ok.png\0", "\0", "ok.png\0../../secret.png", f"file://{secret}", "FILE:///etc/passwd",
        "http://127.0.0.1:9/a.png", "https://a.invalid/a.png", "ftp://a.invalid/a.png", "s3://bucket/a.png",
        "hf://datasets/a/a.png", "gopher://127.0.0.1:9/_", "data:image/png;base64,AA==", "round", "round/a.png",
    ]  # fmt: skip
    missing = [
        "gone.png", "none.png", "OK.png ", "..%2fsecret.png", "%252e%252e%252fsecret.png",
        "..;/secret.png", ".../secret.png", "~root/a.png", "$HOME/a.png", "\u2025/secret.png",
        "file:secret.png",
        "\u2024\u2024/secret.png", "\uff0e\uff0e\uff0fsecret.png", "..\u2215secret.png", "..\u2044secret.png",
        "..\u29f5a.png",
        "u\u0308ni\u0308 画像.png", "ok.png\n", "\u202egnp.ko", "ok.png::$DATA", "CON", "http:/a.invalid/a.png",
        "http:a.png",
        "ok\ufeff.png", "a\x1b[2J.png",
    ]  # fmt: skip
    return [
        *(NameCase(name) for name in read),
        *(NameCase(name, out) for name in refused),
        *(NameCase(name, none) for name in missing),
        *(NameCase(name, no_file) for name in ("sub", "folder.png", "pipe.png", "socket.png", ".", "in")),
        *(
            NameCase(name, (*unreadable, *out))
            for name in ("ok.png/a.png", "%2e%2e/secret.png", "~/secret.png", "n" * 5000, "n/" * 3000 + "a.png")
        ),
    ]


PIECES = (
    "..", ".", "/", "//", "\\", "sub", "out", "in", "up", "top", "chain", "round", "self", "a.png", "ok.png",
    "secret.png",
    "outside", "root", "etc/passwd", "proc/self/root", "\0", "~", "%2e", "%2f", "C:", "\\\\?\\", "file:", "http:",
    "https://",
    "127.0.0.1:9", "data:", "..;", " ", "\n", "\u2024", "\u2025", "\uff0e", "\uff0f", "\u2215", "\u202e", "\ufeff",
)  # fmt: skip


def spelled(root: Path, count: int, seed: int = 0) -> Iterator[str]:
    """So many names, mixed of pieces and of mixed-up cases, the same for one seed; none of them twice."""
    chance, known = random.Random(seed), [case.name for case in cases(root)]
    pieces, seen = (*PIECES, str(root), str(root.parent)), set[str]()
    while len(seen) < count:
        parts = [chance.choice(pieces) for _ in range(chance.randint(1, 7))]
        if chance.random() < 0.3:
            parts.insert(chance.randint(0, len(parts)), chance.choice(known)[:200])
        name = chance.choice(("", "/")).join(parts)
        if chance.random() < 0.1:
            name = "".join(chance.choice(("./", "sub/./../", "in/", ".//")) for _ in range(3)) + chance.choice(known)
        if name not in seen:
            seen.add(name)
            yield name
