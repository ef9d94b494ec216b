"""Runs that are resumed as something else than they were."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file

from faults.lab import ROWS, Finding, Lab
from ip_adapter_trainer.train import checkpoint

LIMIT_S = 10.0
MANY = 1_000_000

# Settings that must match, each with another value; the published names of what the message has to say.
OTHER_SETTINGS: dict[str, Any] = {
    "seed": 7, "snr_gamma": 5.0, "min_timestep": 100, "timestep_density": "uniform", "random_flip": True,
    "text_drop_rate": 0.5, "max_aspect": 5.0, "adapter_layers": ("up",), "use_ema": True, "variant": "plus",
}  # fmt: skip


def other_run(lab: Lab) -> Iterator[Finding]:
    """Other settings, rows, models or images per step are refused by name; what is accepted is kept."""
    place = lab.place("changes")
    first = place / "first"
    code, said = lab.run("train", lab.training(first, max_train_steps=2))
    assert code == 0, said
    yield _settings(lab, first)
    yield _rows(lab, first, place)
    yield _models(lab, first, place)
    yield _batches(lab, first, place)


def _resumed(lab: Lab, output: Path, processes: int = 1, **changed: Any) -> tuple[int, str]:
    settings = {"max_train_steps": 4, "resume_from_checkpoint": "latest"} | changed
    return lab.run("train", lab.training(output, **settings), processes=processes)


def _refused(result: tuple[int, str], *words: str) -> bool:
    code, said = result
    return code == 2 and all(word in said for word in words) and "Traceback" not in said


def _settings(lab: Lab, first: Path) -> Finding:
    """Each setting is refused by name and flag; none leaves a trace in the run's folder."""
    chosen = list(OTHER_SETTINGS)[: lab.tries(len(OTHER_SETTINGS))]
    before = _content(first)
    lost = [n for n in chosen if not _refused(_resumed(lab, first, **{n: OTHER_SETTINGS[n]}), f"{n} was ", "--")]
    changed = _content(first) != before
    note = f"{', '.join(chosen)}: each refused by name with exit 2, the run's folder untouched"
    note += f"; not refused: {', '.join(lost)}" * bool(lost) + "; the folder CHANGED" * changed
    return Finding("other settings at resume", len(chosen), len(lost) + changed, not lost and not changed, note)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _rows(lab: Lab, first: Path, place: Path) -> Finding:
    """Another caption, a row less, a row more, two rows exchanged; then one accepted, which the checkpoint tells."""
    rows = json.loads((lab.pocket / "data.json").read_text())
    captioned = [*rows[:5], {**rows[5], "text": rows[5]["text"] + "."}, *rows[6:]]
    cases = {
        "a caption": (captioned, "one changed, row 6, now data-0.json, element 6"),
        "a row less": (rows[:-1], f"there were {len(rows)} rows and are {len(rows) - 1}"),
        "a row more": ([*rows, rows[0]], f"there were {len(rows)} rows and are {len(rows) + 1}"),
        "two exchanged": ([rows[1], rows[0], *rows[2:]], "rows changed"),
    }
    lost, tries = [], list(cases)[: lab.tries(len(cases))]
    for number, name in enumerate(tries):
        file = place / f"data-{number}.json"
        file.write_text(json.dumps(cases[name][0]))
        if not _refused(_resumed(lab, first, data_json_file=file), cases[name][1], "--accept_changed rows"):
            lost.append(name)
    output = shutil.copytree(first, place / "accepted")
    code, said = _resumed(lab, output, data_json_file=place / "data-0.json", accept_changed="rows")
    kept = code == 0 and checkpoint.read(output / "checkpoint-4").state["accepted"]
    if not kept or "WARNING: resuming although the training rows changed" not in said:
        lost.append("accepting")
    note = f"{', '.join(tries)}: refused, with the row or the numbers of rows; accepted by flag: told and kept"
    note += f"; wrong: {', '.join(lost)}" * bool(lost)
    return Finding("other rows at resume", len(tries) + 1, len(lost), not lost, note)


def _models(lab: Lab, first: Path, place: Path) -> Finding:
    """Under the same name: a UNet that was trained on, another noise schedule, another image encoder."""
    base = shutil.copytree(lab.pocket / "base", place / "base")
    encoder = shutil.copytree(lab.pocket / "image_encoder", place / "image_encoder")
    same = _resumed(lab, shutil.copytree(first, place / "moved"), pretrained_model_name_or_path=base)
    lost = [] if same[0] == 0 else ["the same base in another folder"]
    cases = {"unet": base / "unet", "scheduler": base / "scheduler", "image_encoder": encoder}
    chosen = list(cases)[: lab.tries(len(cases))]
    for name in chosen:
        file, content = _exchange(cases[name])
        result = _resumed(lab, first, pretrained_model_name_or_path=base, image_encoder_path=encoder)
        file.write_bytes(content)
        if not _refused(result, f"other weights or settings than before: {name}\n", "--accept_changed models"):
            lost.append(name)
    note = f"{', '.join(chosen)} changed by a thousandth or one setting: refused by name; a moved base: taken"
    note += f"; wrong: {', '.join(lost)}" * bool(lost)
    return Finding("other models under the same name at resume", len(chosen) + 1, len(lost), not lost, note)


def _exchange(folder: Path) -> tuple[Path, bytes]:
    """Another model in a folder; the file that was changed and what it held."""
    file = next(iter([*folder.glob("*.safetensors"), *folder.glob("scheduler_config.json")]))
    content = file.read_bytes()
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(content) | {"beta_end": 0.02}))
    else:
        file.unlink()  # a hard link or a memory map of it stays what it is
        tensors = {k: v * 1.001 if v.is_floating_point() else v for k, v in load(content).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return file, content


def _batches(lab: Lab, first: Path, place: Path) -> Finding:
    """The same images per step by other batches and processes is taken, another number of them refused."""
    taken: tuple[tuple[str, int, dict[str, int]], ...] = (
        ("1 x 1 x 2", 1, {"train_batch_size": 1, "gradient_accumulation_steps": 2}),
        ("1 x 2 x 1", 2, {"train_batch_size": 1}),
    )
    refused: tuple[tuple[str, int, dict[str, int], str], ...] = (
        ("4 x 1 x 1", 1, {"train_batch_size": 4}, "give --train_batch_size=2"),
        ("2 x 2 x 1", 2, {}, "give --train_batch_size=1"),
    )
    tries = lab.tries(2)
    lost = []
    for number, (name, processes, settings) in enumerate(taken[:tries]):
        output = shutil.copytree(first, place / f"batch-{number}")
        if _resumed(lab, output, processes, **settings)[0] != 0:
            lost.append(name)
    for name, processes, settings, way in refused[:tries]:
        result = _resumed(lab, first, processes, **settings)
        if not (result[0] != 0 and "a step had 2 images and would have 4" in result[1] and way in result[1]):
            lost.append(name)
    names = [case[0] for case in taken[:tries]], [case[0] for case in refused[:tries]]
    note = f"batch x processes x accumulation 2 x 1 x 1 before; taken: {', '.join(names[0])}; "
    note += f"refused with the batch to give: {', '.join(names[1])}" + f"; wrong: {', '.join(lost)}" * bool(lost)
    return Finding("other batches and processes at resume", 2 * tries, len(lost), not lost, note)


def one_in_a_million(lab: Lab) -> Iterator[Finding]:
    """One character of one caption changes among a million rows."""
    place = lab.place("million")
    rows, changed = lab.tries(MANY), 2 * lab.tries(MANY) // 3
    _write_rows(place / "data.jsonl", rows)
    output = place / "out"
    settings = {"data_json_file": place / "data.jsonl", "max_train_steps": 1, "num_train_epochs": 1}
    code, said = lab.run("train", lab.training(output, **settings))
    assert code == 0, said
    began = time.monotonic()
    lab.run("train", lab.training(place / "bare", dry_run=True))
    bare_s = time.monotonic() - began
    _write_rows(place / "data.jsonl", rows, changed)
    began = time.monotonic()
    result = lab.run("train", lab.training(output, resume_from_checkpoint="latest", **settings))
    took_s = time.monotonic() - began
    named = _refused(result, f"of {rows:,} rows one changed, row {changed + 1:,}", f"line {changed + 1}")
    state = (output / "checkpoint-1" / checkpoint.STATE).stat().st_size
    note = f"one character of {rows:,} captions: refused, row {changed + 1:,} named, {took_s:.1f} s from start to exit "
    note += f"(limit {LIMIT_S:g} s; a start over {ROWS} rows takes {bare_s:.1f} s); "
    note += f"training_state.json is {state / 1e3:.0f} kB"
    yield Finding("one row of a million changed at resume", 1, int(not named), named and took_s <= LIMIT_S, note)


def _write_rows(file: Path, rows: int, changed: int = -1) -> None:
    """Rows over the pocket's own pictures, each caption another."""
    with file.open("w") as out:
        for number in range(rows):
            caption = f"a picture of {number * 7919 % rows} things on a table, taken at noon{'.' * (number == changed)}"
            out.write(f'{{"image_file": "{number % 16:05d}.png", "text": "{caption}"}}\n')
