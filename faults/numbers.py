"""Numbers that are not finite: in pictures, in prepared sets, in the steps themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from faults.lab import ROWS, Finding, Lab
from ip_adapter_trainer.cache.shards import checksums_of
from ip_adapter_trainer.pocket import world
from ip_adapter_trainer.storage.checkpoints import all_checkpoints
from ip_adapter_trainer.storage.digests import KEY_BYTES
from ip_adapter_trainer.train import checkpoint
from ip_adapter_trainer.train.step_log import MAX_BAD_STEPS
from ip_adapter_trainer.train.tree import flatten

EPOCH = ROWS // 2  # steps, at the lab's batch of two
_EXIT_NOT_FINITE, _EXIT_LAUNCHER = 5, 1  # the launcher's, whatever became of what it launched
_AT_STEPS, _AT_A_SAVE = f"error: gradients were not finite for {MAX_BAD_STEPS} steps in a row", "and are not saved"


@dataclass(frozen=True)
class Seen:
    """What a run left behind."""

    code: int
    written: int  # numbers in all of its checkpoints
    not_finite: int  # of them
    named: tuple[int, ...]  # rows named with each step that was skipped
    last: int  # the newest checkpoint that reads well; 0: none
    said: str

    def __str__(self) -> str:
        skipped = f"{len(self.named)} steps skipped, {sum(self.named)} rows named; " * bool(self.named)
        return f"{skipped}exit {self.code}, {self.not_finite} of {self.written:,} written numbers not finite"


def not_finite(lab: Lab) -> Iterator[Finding]:
    """Bad numbers reach the trainer from everywhere; none reaches a checkpoint."""
    place = lab.place("numbers")
    yield _nan_pixel(lab, place)
    yield from _inf_in_a_set(lab, place)
    yield from _huge_rates(lab, place)


def _seen(output: Path, code: int, said: str) -> Seen:
    tensors: list[torch.Tensor] = []
    last = 0
    for folder in all_checkpoints(output):
        saved = checkpoint.read(folder)
        tensors += [*saved.weights.values(), *flatten(saved.state, "state")[0].values()]
        last = saved.step
    skipped = [line for line in said.splitlines() if "step skipped" in line]
    return Seen(
        code,
        sum(tensor.numel() for tensor in tensors),
        sum(int((~tensor.isfinite()).sum()) for tensor in tensors),
        tuple(line.count("data.json, element ") for line in skipped),
        last,
        said,
    )


def _trained(lab: Lab, output: Path, processes: int = 1, **settings: Any) -> Seen:
    code, said = lab.run("train", lab.training(output, **settings), processes=processes)
    return _seen(output, code, said)


def _nan_pixel(lab: Lab, place: Path) -> Finding:
    """One NaN in a float TIFF: a faulty row, told by kind; what cannot be read trains nothing."""
    images = shutil.copytree(lab.pocket / "images", place / "images")
    rows = json.loads((lab.pocket / "data.json").read_text())
    pixels = np.full((world.SIZE_PX, world.SIZE_PX), 0.5, np.float32)
    pixels[3, 5] = np.nan
    Image.fromarray(pixels).save(images / "nan.tif")
    rows[7]["image_file"] = "nan.tif"
    (place / "data.json").write_text(json.dumps(rows))
    inputs: dict[str, Any] = {"data_json_file": place / "data.json", "data_root_path": images}
    output = place / "pixel"
    seen = _trained(lab, output, max_train_steps=EPOCH, max_fault_rate=0.5, **inputs)
    faults = (output / "faults.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in faults if "nan.tif" in line]
    strict = _trained(lab, place / "strict", max_fault_rate=0, **inputs)
    good = seen.code == 0 and not seen.not_finite and seen.last == EPOCH and len(told) == 1 and strict.code == 3
    note = f"the row is replaced and listed as {told[0]['kind'] if told else 'nothing'}; {seen}; with a limit of 0 "
    return Finding("a NaN pixel in a float TIFF", 1, int(not good), good, f"{note}exit {strict.code}")


def _inf_in_a_set(lab: Lab, place: Path) -> Iterator[Finding]:
    """An infinite latent under a right checksum: one is skipped, a set of them stops the run; another one goes on."""
    folder = place / "set"
    settings = {**lab.inputs, "prepared_dir": folder}
    code, said = lab.run("prepare", settings)
    assert code == 0, said
    bad = shutil.copytree(folder, place / "bad")
    assert _poison(bad, only_first=True) == 1
    seen = _trained(lab, place / "one", prepared_dir=bad, max_train_steps=EPOCH)
    good = seen.code == 0 and not seen.not_finite and seen.named == (2,) and seen.last == EPOCH
    yield Finding("an infinite latent in a prepared set", 1, int(not good), good, str(seen))

    _poison(bad, only_first=False)
    output = place / "all"
    first = _trained(lab, output, prepared_dir=folder, max_train_steps=2)
    seen = _trained(lab, output, prepared_dir=bad, max_train_steps=20, resume_from_checkpoint="latest")
    again = _trained(lab, output, prepared_dir=folder, max_train_steps=20, resume_from_checkpoint="latest")
    good = (first.code, seen.code, again.code) == (0, _EXIT_NOT_FINITE, 0) and not again.not_finite
    good = good and seen.named == (2,) * MAX_BAD_STEPS and again.last == 20
    note = f"{seen}; the checkpoint of step {seen.last} resumes with a good set to step {again.last}"
    yield Finding("a prepared set full of infinite latents", 1, int(not good), good, note)


def _poison(folder: Path, *, only_first: bool) -> int:
    """Puts an infinity into latents of a set and makes their checksums right; how many."""
    done = 0
    for file in sorted(folder.glob("moments/*/*.safetensors")):
        tensors = load_file(file)
        rows = tensors["value"].flatten(1)
        chosen = slice(0, 1) if only_first else slice(None)
        rows[chosen, 0] = float("inf")
        keys = tensors["key"].numpy().view(f"S{KEY_BYTES}").reshape(-1)
        sums = checksums_of(keys, rows.contiguous().view(torch.uint8).numpy())
        tensors["sum"] = torch.from_numpy(sums.view(np.uint8).reshape(len(rows), -1).copy())
        file.unlink()
        save_file({**tensors, "value": rows.reshape(tensors["value"].shape).contiguous()}, file)
        done += len(rows[chosen])
        if only_first:
            break
    return done


def _huge_rates(lab: Lab, place: Path) -> Iterator[Finding]:
    """Learning rates that lead to gradients, or at once to weights, that are not finite; in both precisions.

    With a checkpoint at every step the weights are looked at before it is written, else the gradients say it.
    """
    cases: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("a learning rate of 1e30, saving at every step", 1, {"learning_rate": 1e30}),
        ("a learning rate of 1e30", 1, {"learning_rate": 1e30, "save_steps": 100}),
        ("a learning rate of 1e300", 1, {"learning_rate": 1e300}),
        (
            "a learning rate of 1e30, two processes",
            2,
            {"learning_rate": 1e30, "save_steps": 100, "train_batch_size": 1},
        ),
        ("a learning rate of 1e300, two processes", 2, {"learning_rate": 1e300, "train_batch_size": 1}),
        ("a learning rate of 1e30, frozen weights in bf16", 1, {"learning_rate": 1e30, "mixed_precision": "bf16"}),
        ("a learning rate of 1e30, with an average", 1, {"learning_rate": 1e30, "use_ema": True}),
    )
    for number, (name, processes, huge) in enumerate(cases[: lab.tries(len(cases))]):
        output = place / f"rate-{number}"
        normal = {key: value for key, value in huge.items() if key != "learning_rate"}
        first = _trained(lab, output, processes, max_train_steps=2, **normal)
        length: dict[str, Any] = {"max_train_steps": 40, "resume_from_checkpoint": "latest", "max_grad_norm": 1e9}
        seen = _trained(lab, output, processes, **length, **huge)
        kept = _trained(lab, output, processes, **(length | {"max_train_steps": seen.last + 1}), **normal)
        good = first.code == 0 and not seen.not_finite and seen.last == 2
        good = good and seen.code == (_EXIT_NOT_FINITE if processes == 1 else _EXIT_LAUNCHER)
        good = good and (_AT_STEPS if "save_steps" in huge else _AT_A_SAVE) in seen.said
        good = good and seen.named == ((2,) * MAX_BAD_STEPS if "save_steps" in huge else ())
        resumes = kept.code == 0 and kept.last == seen.last + 1
        note = f"{seen}; the checkpoint of step {seen.last} {'resumes' if resumes else 'does NOT resume'}"
        yield Finding(name, 1, int(not good or not resumes), good and resumes, note)
