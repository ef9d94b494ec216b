"""The formats that depend on what is installed: read upright where they can be, named for what they are elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, features

from faults.corpus.files import Array, encoded
from faults.corpus.pictures import BACKGROUND, BLOCKS, UPRIGHT
from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.images import decode as decoder
from ip_adapter_trainer.images.decode import FORMATS, SUFFIXES, ImageFault, decode, read_size
from ip_adapter_trainer.images.limits import Limits

HAS_AVIF = "avif" in features.modules and features.check("avif")
AVIF = pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")
LARGE = np.kron(BLOCKS, np.ones((2, 2, 1), np.uint8))
_OTHER, _ORIENTATION = b"\x01\x03\x00\x03", b"\x01\x12\x00\x03"  # tags of EXIF with the kind of their value
HEIC_HEAD = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"


def _is_heif_installed() -> bool:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return False
    return True


def test_suffixes_are_those_that_can_be_read_here() -> None:
    assert {".jpg", ".jpeg", ".jpe", ".jfif"} <= SUFFIXES
    assert (".avif" in SUFFIXES, "AVIF" in FORMATS) == (HAS_AVIF, HAS_AVIF)
    assert (".heic" in SUFFIXES, ".heif" in SUFFIXES, "HEIF" in FORMATS) == (_is_heif_installed(),) * 3
    Image.init()
    assert all(Image.registered_extensions()[suffix] in FORMATS for suffix in SUFFIXES)


def _turned(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if format == "HEIF":
        return encoded(LARGE, format, quality=-1, chroma=444, exif=exif.tobytes())
    exif[0x0103] = orientation  # Pillow moves an orientation to the box of AVIF; this becomes one below
    content = encoded(LARGE, format, quality=100, subsampling="4:4:4", exif=exif)
    return content.replace(_OTHER, _ORIENTATION)


def _demand_upright(content: bytes, right: Array) -> None:
    given = np.asarray(decode(content, Limits()).image, dtype=float)
    assert given.shape == right.shape and np.abs(given - right).max() <= 30
    assert read_size(content, Limits()) == right.shape[:2]


def _heif() -> None:
    pytest.importorskip("pillow_heif")


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", [pytest.param("AVIF", marks=AVIF), "HEIF"])
def test_avif_and_heif_are_turned_once_and_by_their_boxes_alone(format: str, orientation: int) -> None:
    if format == "HEIF":
        _heif()
    content = _turned(format, orientation)
    boxes = content.count(b"irot") + content.count(b"imir")
    assert bool(boxes) == (orientation > 1) and _ORIENTATION in content
    _demand_upright(content, UPRIGHT[orientation](LARGE))


@AVIF
def test_exif_alone_does_not_turn_an_avif() -> None:
    exif = Image.Exif()
    exif[0x0103] = 6
    content = encoded(LARGE, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    turned = content.replace(_OTHER, _ORIENTATION)
    assert turned != content
    _demand_upright(turned, LARGE)


@pytest.mark.parametrize("format", [pytest.param("AVIF", marks=AVIF), "HEIF"])
def test_avif_and_heif_have_alpha_frames_and_faults_like_others(format: str) -> None:
    if format == "HEIF":
        _heif()
    clear = np.dstack([LARGE, np.zeros(LARGE.shape[:2], np.uint8)])
    image = np.asarray(decode(encoded(clear, format), Limits(), BACKGROUND).image)
    assert np.abs(image.astype(int) - BACKGROUND).max() <= 3
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    several = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:]), Limits())
    assert several.notes == ("several_frames",) and several.image.getpixel((9, 9))[0] > 200  # type: ignore[index]
    content = encoded(LARGE, format)
    for end in (40, len(content) // 2, len(content) - 1):
        assert _fault(content[:end]).kind in ("damaged", "truncated")
    assert _fault(encoded(Image.new("RGB", (2001, 2001)), format)).kind == "too_many_pixels"


def _fault(content: bytes) -> Fault:
    with pytest.raises(ImageFault) as caught:
        decode(content, Limits())
    return caught.value.fault


def test_what_cannot_be_read_here_is_told_with_what_would_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "FORMATS", tuple({*FORMATS} - {"AVIF", "HEIF"}))
    avif = b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1A" + bytes(400)
    for content, package in ((avif, "pip install -U pillow"), (HEIC_HEAD + bytes(400), "pip install pillow-heif")):
        fault = _fault(content)
        assert fault.kind == "not_a_picture" and package in fault.remedy
    film = _fault(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(400))
    assert film.kind == "not_a_picture" and "install" not in film.remedy
