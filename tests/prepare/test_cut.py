"""Captions that are longer than the text encoders read are counted, and told where they would be trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ip_adapter_trainer.cli import RUN, guarded
from ip_adapter_trainer.families import Reach
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.manifest.manifest import Manifest, read_manifest
from ip_adapter_trainer.pocket import models
from ip_adapter_trainer.prepare import cut
from ip_adapter_trainer.prepare.cut import cut_captions
from tests.manifest.rows import write_manifest, write_pictures

ROOM = models.MAX_TOKENS - 2
TEXTS = ["a red star", "star " * ROOM, None, ["", "star " * 20, "é" * 7], ["é" * 8, "\U0001d160" * 2], "x" * ROOM]
TOLD = "3 of 7 captions are cut at 14 tokens (words or parts of words): the longest has 24, the first is "


def manifest(folder: Path, texts: list[object]) -> Manifest:
    path = write_manifest(folder, [f"{number}.png" for number in range(len(texts))], text=texts)
    return read_manifest(ReadConfig(data_json_file=str(path)))


def test_captions_that_are_cut_are_counted_in_lists_too(tmp_path: Path) -> None:
    found = cut_captions(manifest(tmp_path, TEXTS), [models.tokenizer()])
    assert (found.captions, found.unsure, found.counted, found.cut, found.longest) == (7, 5, 5, 3, 24)
    assert str(found).startswith(f"{TOLD}data.json, element 4 (3.png); shorten them")
    assert str(cut_captions(manifest(tmp_path, ["", "a"]), [models.tokenizer()])).startswith("0 of 1 captions are cut")


@pytest.mark.parametrize("lengths", [(16, 10), (10, 16)])
def test_a_caption_is_cut_if_any_encoder_cuts_it(lengths: tuple[int, int]) -> None:
    tokenizers = [models.tokenizer.__wrapped__() for _ in lengths]
    for tokenizer, length in zip(tokenizers, lengths, strict=True):
        tokenizer.model_max_length = length
    reach = Reach(tokenizers)
    assert reach.tokens == 8 and reach.tokens_if_cut(["star " * count for count in (8, 9, 15)]) == [0, 9, 15]


@given(st.text(st.characters(max_codepoint=127), max_size=ROOM) | st.text(max_size=ROOM))
@example("\U0001d160" * 3)  # 12 bytes that become 36
@example("İ" * 7)
def test_what_surely_is_read_whole_is(text: str) -> None:
    reach = Reach([models.tokenizer()])
    assert not reach.surely_covers(text) or reach.tokens_if_cut([text]) == [0]


def test_of_very_many_a_sample_is_counted_and_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest(tmp_path, [["star " * 20, "a"] if number % 2 else "star star star" for number in range(80)])
    whole = cut_captions(rows, [models.tokenizer()])
    assert (whole.captions, whole.unsure, whole.counted, whole.cut) == (120, 40, 40, 40)
    monkeypatch.setattr(cut, "_MOST", 10)
    found = cut_captions(rows, [models.tokenizer()])
    assert (found.unsure, found.counted, found.cut) == (40, 10, 10) and found == cut_captions(
        rows, [models.tokenizer()]
    )
    assert str(found).startswith("10 of 10 captions looked at, a sample of the 40 that may be too long, are cut at 14 ")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_manifest(tmp_path, write_pictures(tmp_path, len(TEXTS)), text=TEXTS)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_check_reads_the_tokenizers_alone(
    kind: str, rows: Path, base_folder: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(base_folder(kind), tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = [f"--data_json_file={rows}", f"--pretrained_model_name_or_path={base}"]
    assert guarded(RUN["check"], flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "clean: 6 rows, all read" and lines[-3].startswith(TOLD)
    assert guarded(RUN["check"], [flags[0], "--revision=main"]) == 2
    assert "give --pretrained_model_name_or_path too" in capsys.readouterr().err
    assert guarded(RUN["check"], flags[:1]) == 0 and "captions" not in capsys.readouterr().out
    shutil.rmtree(base / "tokenizer")
    rows.unlink()
    assert guarded(RUN["check"], flags) == 2
    assert "cannot load the base model's tokenizer" in capsys.readouterr().err, "before anything else is read"


@pytest.mark.parametrize("command", ["train", "prepare", "prepare text"])
def test_it_is_told_once_where_captions_are_encoded(
    command: str, rows: Path, base_folder: Callable, encoder_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = [
        f"--pretrained_model_name_or_path={base_folder('sd1')}", f"--image_encoder_path={encoder_folder}",
        f"--data_json_file={rows}", "--resolution=32",
    ]  # fmt: skip
    own = {
        "train": [f"--output_dir={tmp_path / 'out'}", "--dry_run"], "prepare": [f"--prepared_dir={tmp_path / 'set'}"],
    }  # fmt: skip
    own["prepare text"] = [*own["prepare"], "--prepare_text"]
    assert guarded(RUN[command.split()[0]], [*flags, *own[command]]) == 0
    assert capsys.readouterr().err.count(TOLD) == (command != "prepare")
