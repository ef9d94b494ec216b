"""Colours of embedded profiles: within 2/255 of what numpy makes of the same primaries, curves and inks."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from faults.corpus import profiles
from faults.corpus.files import Array, chunk, encoded, gray, over
from faults.corpus.mutate import of_bytes
from faults.corpus.pictures import ALPHA, BACKGROUND, BLOCKS, CMYK, DEEP, GRAY, RGB
from faults.corpus.profiles import ADOBE_RGB, D50, D65, DISPLAY_P3, PROPHOTO, SRGB_PRIMARIES, gamma, srgb_curve
from ip_adapter_trainer.images.decode import FORMATS, DecodedImage, decode
from ip_adapter_trainer.images.limits import MOST_PROFILE_BYTES, Limits
from ip_adapter_trainer.prepare.check import check_rows as check
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig

SPACES = {
    "Adobe RGB": (ADOBE_RGB, D65, gamma(563 / 256)),
    "Display P3": (DISPLAY_P3, D65, srgb_curve),
    "ProPhoto RGB": (PROPHOTO, D50, gamma(1.8)),
}
ADOBE = SPACES["Adobe RGB"]
CURVES = {"gamma 2.2": gamma(2.2), "gamma 1.8": gamma(1.8), "dot gain": profiles.dot_gain}


def _read(content: bytes) -> DecodedImage:
    return decode(content, Limits(), BACKGROUND)


def _demand(content: bytes, expected: Array) -> None:
    picture = _read(content)
    assert picture.notes == () and picture.image.mode == "RGB"
    assert np.abs(np.asarray(picture.image, dtype=float) - expected).max() <= 2


@pytest.mark.parametrize("name", SPACES)
def test_colours_of_rgb_become_those_of_srgb(name: str) -> None:
    icc, right = profiles.rgb_profile(*SPACES[name]), profiles.rgb_in_srgb(RGB, *SPACES[name])
    assert np.abs(right - RGB).max() > 50
    _demand(encoded(RGB, "PNG", icc_profile=icc), right)
    _demand(encoded(RGB, "TIFF", icc_profile=icc), right)
    _demand(encoded(RGB, "WEBP", lossless=True, icc_profile=icc), right)
    blocks = profiles.rgb_in_srgb(BLOCKS, *SPACES[name])
    _demand(encoded(BLOCKS, "JPEG", quality=100, subsampling=0, icc_profile=icc), blocks)
    palette = Image.fromarray(BLOCKS).quantize(8)
    assert palette.mode == "P"
    _demand(encoded(palette, "PNG", icc_profile=icc), blocks)


def test_transparency_is_laid_on_the_ground_after_the_colours_were_converted() -> None:
    icc, right = profiles.rgb_profile(*ADOBE), profiles.rgb_in_srgb(RGB, *ADOBE)
    _demand(encoded(np.dstack([RGB, ALPHA]), "PNG", icc_profile=icc), over(right, ALPHA, BACKGROUND))
    colour = RGB[3, 4]
    clear = np.where((colour == RGB).all(-1, keepdims=True), BACKGROUND, right)
    _demand(encoded(RGB, "PNG", transparency=tuple(colour.tolist()), icc_profile=icc), clear)


@pytest.mark.parametrize("name", CURVES)
def test_gray_becomes_that_of_srgb(name: str) -> None:
    icc, right = profiles.gray_profile(CURVES[name]), gray(profiles.gray_in_srgb(GRAY, CURVES[name]))
    _demand(encoded(GRAY, "PNG", icc_profile=icc), right)
    content = encoded(np.dstack([GRAY, ALPHA]), "PNG", icc_profile=icc)
    _demand(content, over(right, ALPHA, BACKGROUND))
    deep = gray(profiles.gray_in_srgb(np.rint(DEEP / 257), CURVES[name]))
    _demand(encoded(DEEP, "PNG", icc_profile=icc), deep)


def test_gray_is_of_equal_parts_of_a_profile_of_rgb() -> None:
    right = profiles.rgb_in_srgb(gray(GRAY), *ADOBE)
    _demand(encoded(GRAY, "PNG", icc_profile=profiles.rgb_profile(*ADOBE)), right)


def test_inks_are_those_of_their_profile_in_tiff_and_in_jpeg_that_holds_them_inverted() -> None:
    icc = profiles.cmyk_profile()
    content = encoded(Image.fromarray(CMYK, "CMYK"), "TIFF", icc_profile=icc)
    _demand(content, profiles.lab_in_srgb(profiles.cmyk_to_lab(CMYK / 255)))
    inks = np.kron(CMYK[:3, :4], np.ones((8, 8, 1), np.uint8))
    content = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0, icc_profile=icc)
    assert b"Adobe" in content[:2000]
    _demand(content, profiles.lab_in_srgb(profiles.cmyk_to_lab(inks / 255)))


def test_the_darkest_colour_of_a_profile_becomes_black() -> None:
    """By black point compensation: XYZ is scaled towards white so far that the black of the profile is at zero."""
    veiled = 0.02
    space = (SRGB_PRIMARIES, D65, lambda samples: veiled + (1 - veiled) * srgb_curve(samples))
    _demand(encoded(RGB, "PNG", icc_profile=profiles.rgb_profile(*space)), RGB)


_SRGB = {
    "Pillow's own": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "by its numbers": profiles.rgb_profile(SRGB_PRIMARIES, D65, srgb_curve),
    "rounded": profiles.rgb_profile(SRGB_PRIMARIES, D65, lambda samples: srgb_curve(samples) ** 1.008),
}


@pytest.mark.parametrize("name", _SRGB)
def test_profiles_of_srgb_leave_every_value_as_it_is(name: str) -> None:
    gray_profile = profiles.gray_profile(lambda samples: srgb_curve(samples) ** 1.008)
    opaque = np.dstack([RGB, ALPHA | 255])
    for samples, icc in ((RGB, _SRGB[name]), (GRAY, _SRGB[name]), (opaque, _SRGB[name]), (GRAY, gray_profile)):
        picture = _read(encoded(samples, "PNG", icc_profile=icc))
        right = samples[..., :3] if samples.ndim == 3 else gray(samples)
        assert np.array_equal(np.asarray(picture.image), right) and not picture.notes


_ADOBE = profiles.rgb_profile(*ADOBE)
_LEFT_OUT = {
    "cut short": _ADOBE[:200],
    "noise": np.random.default_rng(0).bytes(3000),
    "noise behind a good header": _ADOBE[:128] + np.random.default_rng(0).bytes(3000),
    "of another class": _ADOBE[:12] + b"link" + _ADOBE[16:],
    "for gray": profiles.gray_profile(gamma(1.8)),
    "for inks": profiles.cmyk_profile(),
    "too large": _ADOBE + bytes(MOST_PROFILE_BYTES),
}


@pytest.mark.parametrize("what", _LEFT_OUT)
def test_a_profile_that_cannot_be_applied_is_noted_and_the_picture_taken_as_srgb(what: str) -> None:
    picture = _read(encoded(RGB, "TIFF", icc_profile=_LEFT_OUT[what]))
    assert picture.notes == ("profile_left_out",)
    assert np.array_equal(np.asarray(picture.image), RGB)


def test_a_profile_of_rgb_does_not_fit_inks() -> None:
    plain, given = (encoded(Image.fromarray(CMYK, "CMYK"), "TIFF", **more) for more in ({}, {"icc_profile": _ADOBE}))
    assert _read(given).notes == ("profile_left_out",) and _read(given).image.tobytes() == _read(plain).image.tobytes()


@pytest.mark.parametrize("icc", [_ADOBE, profiles.gray_profile(gamma(1.8)), profiles.cmyk_profile()])
def test_mutated_profiles_are_applied_or_left_out_and_nothing_else(icc: bytes) -> None:
    mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}[icc[16:20]]
    picture, chance = Image.fromarray(RGB).convert(mode), random.Random(0)
    for _ in range(60):
        content = encoded(picture, "TIFF", icc_profile=of_bytes(chance, icc))
        assert _read(content).notes in ((), ("profile_left_out",))


def _interoperable(index: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: index}
    return exif


def _png(*chunks: bytes) -> bytes:
    plain = encoded(RGB, "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


_SRGB_POINTS = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
_P3_POINTS = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
_TOLD = {
    "gAMA of sRGB": (_png(chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"cHRM", _SRGB_POINTS)), False),
    "sRGB over gAMA": (_png(chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100000))), False),
    "gAMA of linear light": (_png(chunk(b"gAMA", struct.pack(">I", 100000))), True),
    "cHRM of Display P3": (_png(chunk(b"cHRM", _P3_POINTS)), True),
    "cICP of Display P3": (_png(chunk(b"cICP", bytes([12, 13, 0, 1]))), True),
    "cICP of sRGB": (_png(chunk(b"cICP", bytes([1, 13, 0, 1]))), False),
    "EXIF of Adobe RGB": (encoded(BLOCKS, "JPEG", exif=_interoperable("R03")), True),
    "EXIF of sRGB": (encoded(BLOCKS, "JPEG", exif=_interoperable("R98")), False),
}


@pytest.mark.parametrize("what", _TOLD)
def test_colours_that_are_told_otherwise_than_by_a_profile_are_noted_and_left(what: str) -> None:
    content, is_noted = _TOLD[what]
    picture = _read(content)
    assert picture.notes == (("not_srgb",) if is_noted else ())
    plain = encoded(BLOCKS, "JPEG") if what.startswith("EXIF") else encoded(RGB, "PNG")
    assert picture.image.tobytes() == _read(plain).image.tobytes()


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
def test_avif_has_profiles_and_its_codes_are_noted() -> None:
    plain = encoded(BLOCKS, "AVIF")
    stored = np.asarray(_read(plain).image)
    _demand(encoded(BLOCKS, "AVIF", icc_profile=_ADOBE), profiles.rgb_in_srgb(stored, *ADOBE))
    wide = plain.replace(b"colrnclx\0\1\0\x0d", b"colrnclx\0\x09\0\x10")  # BT.2020 and PQ
    assert _read(plain).notes == () and _read(wide).notes == ("not_srgb",)


def test_check_counts_what_is_noted(tmp_path: Path) -> None:
    for name, content in (("a", encoded(RGB, "PNG", icc_profile=_ADOBE[:200])), ("b", _TOLD["cICP of Display P3"][0])):
        (tmp_path / f"{name}.png").write_bytes(content)
        (tmp_path / f"{name}.txt").write_text("a star")
    report = check(CheckConfig(data_json_file=str(tmp_path)))
    assert report.by_note == {"profile_left_out": 1, "not_srgb": 1} and report.exit_code == 0
    assert "profile_left_out" in str(report) and "not_srgb" in str(report)
