"""A folder of images with their captions in files beside them.

What is passed over is counted and named: nobody trains on less than the folder seems to hold without knowing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ip_adapter_trainer.core.errors import DataProblem, Fault, Problem
from ip_adapter_trainer.images.decode import SUFFIXES as IMAGE_SUFFIXES
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.entries import BOM, Entry
from ip_adapter_trainer.manifest.noticed import Noticed
from ip_adapter_trainer.manifest.rows import Columns
from ip_adapter_trainer.storage.files import open_regular, safe_join

MAX_CAPTION_BYTES = 2**16

_OTHER_IMAGES = """
    .ai .apng .avif .avifs .clip .dds .emf .eps .exr .hdr .heic .heif .hif .icns .ico .j2k .jp2 .jpf .jpx .jxl .jxr
    .kra .pcx .pdf .pfm .psb .psd .qoi .sgi .svg .svgz .tga .webp .wmf .xcf .xpm
    .3fr .arw .cr2 .cr3 .crw .dng .iiq .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf .srw .x3f
"""
_NO_IMAGES = ".avi .mkv .mov .mp4 .webm .7z .arrow .parquet .rar .tar .tgz .zip"  # but what may hold some
_NOT_READ = frozenset(f"{_OTHER_IMAGES} {_NO_IMAGES}".split()) - IMAGE_SUFFIXES
_CAPTIONS = (".txt", ".caption")  # what is usual, whichever is read
_LISTS = (".json", ".jsonl", ".csv", ".tsv")

_ORPHANED = "captions that belong to no picture"
_SHARED = "pictures that share a caption with another, whose name differs by the suffix only"
_EMPTY = "pictures without a caption file, read with the empty caption"
_LISTED = "lists, not read (--data_json_file takes one)"
_LINKED = "linked folders, not read (--allow_outside_root follows them)"
_AGAIN = "folders that are read by another name, or around this one"
_CLOSED = "folders that cannot be read"


class _Pair(NamedTuple):
    """An image and the file that holds its caption, or should."""

    image: str
    caption: str


class _File(NamedTuple):
    name: str
    stem: str
    suffix: str  # in small letters


def read_folder(folder: Path, columns: Columns, config: ReadConfig, noticed: Noticed) -> Iterator[Entry]:
    """Yield an entry for each image, in the order of their names, each with the text file beside it.

    Raises:
        DataProblem: no image has a caption file.
    """
    root, number, missing = folder.resolve(), 0, 0
    for number, pair in enumerate(_pairs(folder, config, noticed), 1):
        text = _caption(root, pair.caption, allow_outside=config.allow_outside_root)
        if text is None:
            missing += 1
            text = Fault("missing_caption", f"there is no {_own(pair.caption)}", "", "write one; it may be empty")
            if config.missing_captions == "empty":
                noticed.add(_EMPTY, pair.image)
                text = ""
        if isinstance(text, Fault):
            yield Entry(number, None, (text,), pair.image)
        else:
            yield Entry(number, {columns.image: pair.image, columns.text: text}, (), pair.image)
    if 0 < number == missing and config.missing_captions == "error":
        raise _no_captions(folder, number, pair.caption, noticed)


def _no_captions(folder: Path, images: int, caption: str, noticed: Noticed) -> DataProblem:
    ways = [f"give --caption_extension {suffix}" for suffix in _CAPTIONS if _unused(suffix) in noticed.counts]
    ways += [f"give --data_json_file {folder / name}" for name in noticed.first.get(_LISTED, [])[:1]]
    ways += ["write these files, which may be empty", "give --missing_captions empty"]
    what = f"none of {images} pictures has a caption file beside it, such as {caption}"
    return DataProblem(what, where=str(folder), remedy=", or ".join(ways))


def _caption(root: Path, name: str, *, allow_outside: bool) -> str | Fault | None:
    """Return the caption in a file, or why it cannot be used; None if there is no such file."""
    try:
        with open_regular(safe_join(root, name, allow_outside=allow_outside)) as stream:
            content = stream.read(MAX_CAPTION_BYTES + 1)
    except Problem as problem:
        return Fault("unsafe_path", f"{_own(name)}: {problem.fault.what}", "", problem.fault.remedy)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Fault("unreadable", f"{_own(name)} cannot be read ({error.strerror})", "", "correct it")
    if len(content) > MAX_CAPTION_BYTES:
        what = f"{_own(name)} is longer than {MAX_CAPTION_BYTES // 2**10} kB"
        return Fault("line_too_long", what, "", "shorten it")
    try:
        return content.removeprefix(BOM).decode().strip()
    except UnicodeDecodeError:
        return Fault("bad_text", f"{_own(name)} is not UTF-8", "", "save it as UTF-8")


def _own(name: str) -> str:
    return PurePosixPath(name).name


def _pairs(folder: Path, config: ReadConfig, noticed: Noticed) -> Iterator[_Pair]:
    for place, names in _Walk(folder, noticed, follows=config.allow_outside_root).files():
        files = [_split(name, config.caption_extension) for name in names]
        captions = {file.stem: file.name for file in files if file.suffix == config.caption_extension}
        stems = set[str]()
        for name, stem, suffix in files:
            if suffix in IMAGE_SUFFIXES:
                if stem in stems:
                    noticed.add(_SHARED, place + name)
                stems.add(stem)
                yield _Pair(place + name, place + captions.get(stem, stem + config.caption_extension))
        _notice(place, files, stems, config.caption_extension, noticed)


def _split(name: str, extension: str) -> _File:
    if name.lower().endswith(extension):  # which may have two dots
        return _File(name, name[: -len(extension)], extension)
    stem, dot, ending = name.rpartition(".")
    return _File(name, stem, f".{ending.lower()}") if dot else _File(name, name, "")


def _notice(place: str, files: list[_File], with_image: set[str], extension: str, noticed: Noticed) -> None:
    """Note what was passed over in one folder: images that are not read, captions and lists."""
    not_read = [file for file in files if file.suffix in _NOT_READ]
    for name, _, suffix in not_read:
        without = " without pillow-heif" if suffix in (".heic", ".heif") else ""
        noticed.add(f"{suffix} files, not read{without}", place + name)
    owned = with_image.union(file.stem for file in not_read)
    for name, stem, suffix in files:
        if suffix in (*_CAPTIONS, extension):
            if stem not in owned:
                noticed.add(_ORPHANED, place + name)
            elif suffix != extension and stem in with_image:
                noticed.add(_unused(suffix), place + name)
        elif suffix in _LISTS and stem not in owned:
            noticed.add(_LISTED, place + name)


def _unused(suffix: str) -> str:
    return f"{suffix} files beside pictures, not read (--caption_extension {suffix} takes them as captions)"


class _Walk:
    """Goes through the folders under one: nothing hidden, no folder twice."""

    def __init__(self, folder: Path, noticed: Noticed, *, follows: bool) -> None:
        self._folder, self._noticed, self._follows = folder, noticed, follows
        top = folder.resolve()
        self._known = {_identity(path) for path in (top, *top.parents)}  # around it, a link would lead to it again

    def files(self) -> Iterator[tuple[str, list[str]]]:
        """Yield, for each folder, the path that its files' names begin with and these names."""
        for parent, folders, files in os.walk(self._folder, followlinks=self._follows, onerror=self._closed):
            place = Path(parent)
            visible = sorted(name for name in folders if not name.startswith("."))
            folders[:] = [name for name in visible if self._enters(place / name)]
            before = "" if place == self._folder else f"{self._name(place)}/"
            yield before, sorted(name for name in files if not name.startswith("."))

    def _enters(self, folder: Path) -> bool:
        identity = _identity(folder) if self._follows else None
        why = _AGAIN if identity in self._known else _LINKED if identity is None and folder.is_symlink() else ""
        if why:
            self._noticed.add(why, self._name(folder))
        elif identity is not None:
            self._known.add(identity)
        return not why

    def _closed(self, error: OSError) -> None:
        self._noticed.add(_CLOSED, self._name(Path(error.filename)))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
