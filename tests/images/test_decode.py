"""What every kind of file becomes: the right pixels, or a fault with a name."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageDraw

from faults.corpus.broken_pictures import broken
from faults.corpus.files import Array, encoded, png_claiming
from faults.corpus.pictures import BACKGROUND, GRAY, RGB, UNIT, UPRIGHT, sound
from ip_adapter_trainer.images.crop import random_part
from ip_adapter_trainer.images.decode import FaultKind, ImageFault, decode, read_size
from ip_adapter_trainer.images.limits import Limits
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.images import ImageFiles

LIMITS = Limits(min_side_px=1)
RNG = np.random.default_rng(0)
SOUND = {case.what: case for case in sound()}
BROKEN = {case.what: case for case in broken()}


def test_the_corpus_is_large_and_every_case_has_its_own_name() -> None:
    assert len(SOUND) == len(sound()) and len(BROKEN) == len(broken()) and len(SOUND) + len(BROKEN) >= 100


@pytest.mark.parametrize("what", SOUND)
def test_pixels_are_those_of_the_reference(what: str) -> None:
    case = SOUND[what]
    picture = decode(case.content, Limits(), BACKGROUND)
    assert picture.image.mode == "RGB" and picture.notes == (("several_frames",) if case.frames > 1 else ())
    assert np.abs(np.asarray(picture.image, dtype=float) - case.pixels).max() <= 1
    assert read_size(case.content, Limits()) == case.pixels.shape[:2]


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_picture_is_the_fault_it_should_be(what: str, tmp_path: Path) -> None:
    case, file = BROKEN[what], tmp_path / "picture"
    if case.content is not None:
        file.write_bytes(case.content)
    assert _fault(file, Limits()) in case.kinds


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_exif_orientation_is_applied_once(format: str, options: dict[str, bool], orientation: int) -> None:
    blocks = np.kron(RNG.integers(0, 2, (3, 4, 1), dtype=np.uint8) * 255, np.ones((8, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(blocks, format, exif=exif, **options)
    upright = UPRIGHT[orientation](blocks)
    assert np.abs(np.asarray(decode(data, LIMITS).image, dtype=int) - upright).max() <= (30 if format == "JPEG" else 0)
    assert read_size(data, LIMITS) == upright.shape[:2]


def _fault(source: Path | bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageFault) as caught:
        decode(source, limits)
    assert caught.value.fault.what and caught.value.fault.remedy and "\n" not in str(caught.value)
    return caught.value.fault.kind


def _as_file(folder: Path, data: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(data)
    return path


def _scratched(data: bytes) -> bytes:
    return data[:500] + bytes(byte ^ 1 for byte in data[500:510]) + data[510:]


def _unfinished(samples: Array) -> bytes:
    return encoded(samples, "JPEG")[:-200]


FAULTY: dict[str, Callable[[Path], Path | bytes]] = {
    "missing_file": lambda folder: folder / "none.png",
    "not_a_file": lambda folder: folder,
    "unreadable": lambda folder: folder / ("n" * 300),
    "empty_file": lambda folder: _as_file(folder, b""),
    "file_too_large": lambda folder: _as_file(folder, bytes(LIMITS.max_file_bytes + 1)),
    "not_a_picture": lambda folder: _as_file(folder, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "damaged": lambda folder: _as_file(folder, _scratched(encoded(RGB, "PNG"))),
    "truncated": lambda folder: _as_file(folder, _unfinished(RGB)),
    "too_many_pixels": lambda folder: _as_file(folder, png_claiming(9000, 9000, b"")),
    "too_small": lambda folder: _as_file(folder, encoded(RGB[:8], "PNG")),
    "too_elongated": lambda folder: _as_file(folder, encoded(np.zeros((20, 220), np.uint8), "PNG")),
    "not_finite": lambda folder: _as_file(folder, encoded(np.where(UNIT > 0.5, np.nan, UNIT), "TIFF")),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_each_fault_has_its_name(kind: str, tmp_path: Path) -> None:
    assert _fault(FAULTY[kind](tmp_path), Limits()) == kind


def test_every_kind_is_tested() -> None:
    assert set(get_args(FaultKind)) == set(FAULTY) | {
        "unsafe_path",
        "changed",
        "not_listed",
        "not_prepared",
        "damaged_values",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_neither_read_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert _fault(tmp_path / "pipe.png") == "not_a_file"
    assert _fault(Path("/dev/zero")) == "not_a_file"


STORED = {
    "JPEG": encoded(RGB, "JPEG"), "PNG": encoded(RGB, "PNG"), "GIF": encoded(GRAY, "GIF"), "BMP": encoded(RGB, "BMP"),
    "WEBP": encoded(RGB, "WEBP", lossless=True), "TIFF": encoded(RGB, "TIFF", compression="tiff_deflate"),
    "PPM": encoded(RGB, "PPM"), "palette": SOUND["palette PNG, opacities"].content, "float": encoded(UNIT, "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("format", STORED)
def test_a_file_cut_anywhere_is_a_fault_unless_all_its_pixels_are_there(format: str) -> None:
    data = STORED[format]
    whole = decode(data, LIMITS).image.tobytes()
    for end in {*range(1, len(data), max(1, len(data) // 60)), *range(len(data) - 25, len(data))}:
        try:
            assert decode(data[:end], LIMITS).image.tobytes() == whole, end
        except ImageFault as error:
            assert error.fault.kind in ("truncated", "damaged", "not_a_picture", "too_small"), end


@pytest.mark.parametrize("format", STORED)
def test_noise_in_a_file_is_a_picture_or_a_fault_and_never_a_word_more(format: str) -> None:
    chance = random.Random(format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(80):
            data = bytearray(STORED[format])
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
            try:
                decode(bytes(data), LIMITS)
            except ImageFault as error:
                assert error.fault.kind in get_args(FaultKind)


def test_a_large_picture_is_refused_where_a_few_kilobytes_claim_it() -> None:
    def saved(picture: Image.Image, format: str) -> bytes:
        out = io.BytesIO()
        picture.save(out, format)
        return out.getvalue()

    for mode, side_px in (("1", 8000), ("RGB", 2001)):
        assert _fault(saved(Image.new(mode, (side_px, side_px)), "PNG"), Limits()) == "too_many_pixels"
    drawing, sky = Image.new("1", (3000, 3000)), Image.linear_gradient("L").resize((3000, 3000))
    for number in range(120):
        ImageDraw.Draw(drawing).circle((number * 25, number * 7), number * 10, outline=1)
    for data in (saved(Image.new("RGB", (2000, 2000)), "PNG"), saved(drawing, "PNG"), saved(sky, "JPEG")):
        decode(data, Limits())


FLAT = encoded(Image.new("L", (2500, 2500)), "PNG")  # 6.25 million pixels
BEYOND: dict[str, tuple[bytes, dict[str, float], list[str]]] = {
    "pixels, then pixels a byte": (
        FLAT, {"max_image_megapixels": 5}, ["max_image_megapixels", "max_pixels_per_byte"]
    ),
    "a side": (encoded(RGB[:9], "PNG"), {}, ["min_side_px"]),
    "the aspect": (encoded(RGB[:16, :5].repeat(11, axis=0), "PNG"), {"min_side_px": 5}, ["max_aspect"]),
    "megabytes": (encoded(RGB, "BMP"), {"max_image_mb": 0.001}, ["max_image_mb"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_who_does_what_a_limit_asks_for_has_the_picture(what: str, tmp_path: Path) -> None:
    content, given, flags = BEYOND[what]
    (tmp_path / "a.png").write_bytes(content)
    for flag in flags:
        with pytest.raises(ImageFault) as caught:
            _images(tmp_path, given).read("a.png")
        (told,) = re.findall(r"(?:raise|lower) --(\w+) to (\d+)$", caught.value.fault.remedy)
        assert told[0] == flag
        given = given | {flag: float(told[1])}
    assert _images(tmp_path, given).read("a.png").image.size == _images(tmp_path, given).size_px("a.png")[::-1]


def _images(folder: Path, given: dict[str, float]) -> ImageFiles:
    return ImageFiles.of(folder, ReadConfig.model_validate({"data_json_file": "a.json", **given}))


def test_pictures_beyond_what_pillow_takes_are_read_where_our_limit_is_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    side_px = 64
    content = encoded(np.zeros((side_px, side_px), np.uint8), "PNG")
    for pillows in (side_px**2 - 1, side_px**2 // 3):  # at which it warns; it refuses what has more than twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with pytest.raises(ImageFault, match=r"raise --max_image_megapixels to 1$"):
            decode(content, Limits(max_pixels=100))
        assert pillows == Image.MAX_IMAGE_PIXELS
        picture = decode(content, Limits(max_pixels=10_000)).image
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert random_part(picture, 1.0, (0, 0, 0)).size == (side_px, side_px)


def test_more_pixels_than_can_be_allowed_are_to_be_shrunk() -> None:
    with pytest.raises(ImageFault, match=r"1000.0 million pixels, over .* 64 million; shrink it to 500 million"):
        decode(png_claiming(100_000, 10_000, b""), Limits())


MEASURE = """
import pickle, resource, sys
from ip_adapter_trainer.images.decode import ImageFault, decode
from ip_adapter_trainer.images.limits import Limits
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
bombs = pickle.load(sys.stdin.buffer)
from PIL import Image; Image.init()
base = peak_mb()
for bomb in bombs:
    try: decode(bomb, Limits())
    except ImageFault: pass
print(peak_mb() - base)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_bombs_cost_their_headers_only() -> None:
    bombs = pickle.dumps([case.content for case in BROKEN.values() if case.bomb])
    result = subprocess.run([sys.executable, "-c", MEASURE], input=bombs, capture_output=True, check=True)
    assert float(result.stdout) < 50
