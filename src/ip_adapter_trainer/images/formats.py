"""The formats of picture files that can be read here: that depends on how Pillow was built and on pillow-heif."""

from __future__ import annotations

from PIL import features

_ALWAYS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_BUILT_IN = {"WEBP": (".webp",), "AVIF": (".avif",)}  # into most builds of Pillow; AVIF since 11.3
_HEIF = {"HEIF": (".heic", ".heif")}

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BRANDS = {  # by which a file of ISO/IEC 14496-12, of which there are films too, says that it is a picture
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"heim": "HEIF", b"heis": "HEIF",
    b"hevc": "HEIF", b"hevx": "HEIF",
}  # fmt: skip
_HELP = {"AVIF": "a Pillow that reads AVIF (pip install -U pillow)", "HEIF": "pillow-heif (pip install pillow-heif)"}
HEAD_BYTES = 64  # of a file, enough for all that is asked here


def readable() -> dict[str, tuple[str, ...]]:
    """Return the suffixes of each format that can be read in this environment, by Pillow's name of it."""
    own = [name for name in _BUILT_IN if name.lower() in features.modules and features.check(name.lower())]
    return _ALWAYS | {name: _BUILT_IN[name] for name in own} | (_HEIF if _register_heif() else {})


def is_known(head: bytes) -> bool:
    """Return whether a file begins as a picture of a known format does, readable here or not."""
    return head.startswith(_SIGNATURES) or _by_brand(head) is not None


def package_for(head: bytes, formats: tuple[str, ...]) -> str | None:
    """Return what would have to be installed to read a file that begins so; None if nothing would help."""
    format = _by_brand(head)
    return None if format is None or format in formats else _HELP[format]


def _by_brand(head: bytes) -> str | None:
    if head[4:8] != b"ftyp":
        return None
    box = head[: int.from_bytes(head[:4], "big")]
    brands = [box[8:12], *(box[at : at + 4] for at in range(16, len(box), 4))]
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)


def _register_heif() -> bool:
    """Has Pillow read HEIF from now on, where the package for it is installed."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        return False
    return True
