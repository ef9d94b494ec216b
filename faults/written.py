"""What the trainer writes: hashes that are verified, no pickles but two, no secrets, no markup of strangers."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.corpus import documents
from faults.lab import Finding, Lab
from faults.strangers import Hosts
from ip_adapter_trainer.adapter_files.pickled import demand_table

TOKEN, PASSWORD, OTHER = "hf_" + "fauLtLab7" * 4, "open-sesame-42", "a-key-of-no-known-form"
MARKUP = "<script>alert(1)</script>"
NAME = "<img src=x onerror=alert(1)>.png"
SCREEN = "\x1b[2J\x1b]0;owned\x07"  # wipes a terminal and renames its window
_ASKED_FOR = "asked-for.bin"
_PICKLES = (documents.WEIGHTS, _ASKED_FOR)
_PLAIN = {".json", ".jsonl", ".yaml", ".yml", ".png", ".safetensors"}


def flips(lab: Lab) -> Iterator[Finding]:
    """One bit of each file of a checkpoint, which a resumed run finds; one digit of its card, which `export` finds."""
    hosts = Hosts(lab)
    yield _flipped_bits(hosts, lab.tries(6))
    yield _changed_digits(hosts, lab.tries(6))


def _flipped_bits(hosts: Hosts, each: int) -> Finding:
    rng, lost = random.Random(0), 0
    for name in documents.FILES * each:
        folder = hosts.copy()
        content = bytearray((folder / name).read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(content)
        lost += not _found_damaged(hosts, "train --resume", folder)
    note = f"one bit in each of {', '.join(documents.FILES)}; refused with exit 2"
    return Finding("hashes are verified on resume", each * len(documents.FILES), lost, not lost, note)


def _changed_digits(hosts: Hosts, tries: int) -> Finding:
    rng, lost = random.Random(0), 0
    for _ in range(tries):
        folder = hosts.copy()
        text = (folder / documents.CARD).read_text()
        at = rng.choice([place for place, letter in enumerate(text) if letter.isdigit()])
        (folder / documents.CARD).write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")
        lost += not _found_damaged(hosts, "export", folder)
    note = f"one digit of {documents.CARD}; refused with exit 2"
    return Finding("hashes are verified on export", tries, lost, not lost, note)


def _found_damaged(hosts: Hosts, command: str, folder: Path) -> bool:
    code, said = hosts.start(command, folder)
    shutil.rmtree(folder)
    return code == 2 and "the checkpoint is damaged" in said


def everything(lab: Lab, folder: Path, **more: Any) -> dict[str, tuple[int, str]]:
    """Has every command write into a folder what it writes: exit codes and what was said, by command.

    Args:
        lab: the lab.
        folder: for everything that is written.
        more: settings of the training run.
    """
    out = folder / "run"
    short = {"max_train_steps": 2, "report_to": "tensorboard", "grid_rows": 2, "grid_steps": 2}
    settings = lab.training(out, **{**short, "num_validation_images": 2, "use_ema": True, **more})
    rows = {name: settings[name] for name in ("data_json_file", "data_root_path")}
    draws = {"adapter": out, "num_inference_steps": 1, "batch_size": 2}
    picture = next((lab.pocket / "images").glob("*.png"))
    scored = {**draws, **rows, "clip_model": lab.pocket / "clip", "num_rows": 4, "num_images_per_prompt": 1}
    prepared = {**lab.inputs, **rows, "prepared_dir": folder / "set"}
    loose = {"max_fault_rate": 0.9}
    return {
        "train": lab.run("train", settings),
        "prepare": lab.run("prepare", {**prepared, **loose}),
        "export": lab.run("export", {"output": folder / "a.safetensors"}, operands=[out]),
        "generate": lab.run("generate", {**draws, "image": picture, "output": folder / "drawn"}),
        "evaluate": lab.run("evaluate", {**scored, **loose, "output": folder / "scores.json"}),
        "inspect": lab.run("inspect", {}, operands=[folder / "a.safetensors"]),
        "check": lab.run("check", {**rows, **loose}),
    }


def own_pickles(lab: Lab) -> Iterator[Finding]:
    """Looks for pickles in every file that every command writes, one of them asked for."""
    folder = lab.place("written")
    ended = everything(lab, folder)
    ended["export to .bin"] = lab.run("export", {"output": folder / _ASKED_FOR}, operands=[folder / "run"])
    failed = {command for command, (code, _) in ended.items() if code}
    files = [path for path in folder.rglob("*") if path.is_file()]
    wrong = [path.name for path in files if not _is_plain(path)]
    tables = [path for path in files if path.name in _PICKLES]
    for table in tables:
        demand_table(table, is_archive=True)
    note = f"{len(files)} files of train, prepare, export, generate and evaluate; {len(tables)} of them, "
    note += f"{', '.join(sorted({path.name for path in tables}))}, are pickles, which name tensors alone"
    note += _told(wrong + sorted(failed))
    fault = "no pickle is written but pytorch_model.bin and an adapter exported as .bin"
    yield Finding(fault, len(files), len(wrong), not wrong and not failed, note)


def _is_plain(path: Path) -> bool:
    """Whether a file is of a kind that cannot hold a pickle, and begins like one of it; or may be a pickle."""
    head = path.read_bytes()[:2]
    if path.name in _PICKLES:
        return zipfile.is_zipfile(path)
    if path.name.startswith("events.out.tfevents"):  # of TensorBoard, protocol buffers
        return not zipfile.is_zipfile(path) and head[:1] != b"\x80"
    is_known = path.suffix in _PLAIN or (path.name == ".lock" and not head)
    return is_known and head[:1] != b"\x80" and not zipfile.is_zipfile(path)


def _told(wrong: list[str]) -> str:
    return f"; wrong: {', '.join(dict.fromkeys(wrong))}" if wrong else ""


def markup(lab: Lab) -> Iterator[Finding]:
    """Captions and names of HTML and of terminal codes, through every command; none ends where it would act."""
    folder = lab.place("markup")
    images, rows = folder / "images", json.loads((lab.pocket / "data.json").read_text())
    shutil.copytree(lab.pocket / "images", images)
    for number, row in enumerate(rows):
        row["text"] = f"{MARKUP} {SCREEN} a star {number}"
    for number, name in enumerate((NAME, f"{SCREEN}.png")):
        shutil.copy(images / rows[number]["image_file"], images / name)
        rows[number]["image_file"] = name
    rows += [{"image_file": f"{MARKUP[:8]}{SCREEN}{number}.png", "text": MARKUP} for number in range(2)]  # not there
    (folder / "rows.json").write_text(json.dumps(rows))
    paths = {"data_json_file": folder / "rows.json", "data_root_path": images, "max_fault_rate": 0.9}
    said = everything(lab, folder, **paths, grid_prompt=f"{MARKUP} a star")
    wrong = [f"{command} exit {code}" for command, (code, _) in said.items() if code not in (0, 3)]
    wrong += [
        f"{command}: a terminal code" for command, (_, text) in said.items() if "\x1b]0" in text or "\x1b[2J" in text
    ]
    files = [path for path in folder.rglob("*") if path.is_file() and images not in path.parents]
    wrong += [
        f"{path.name} may be shown as a page" for path in files if path.suffix in (".html", ".svg", ".md", ".xml")
    ]
    written = [path for path in files if path.suffix in (".json", ".jsonl")]
    for path in written:
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        _ = [json.loads(text) for text in texts]
    note = f"{len(files)} files, none of them a page; {len(written)} of JSON, which parse{_told(wrong)}"
    yield Finding("HTML and terminal codes in captions and names", len(said), len(wrong), not wrong, note)


def secrets(lab: Lab) -> Iterator[Finding]:
    """Tokens in the environment, in flags, in settings and in rows; looks for them in everything that is kept."""
    folder, known = lab.place("secrets"), {"HF_TOKEN": TOKEN, "WANDB_API_KEY": OTHER}
    url = f"https://user:{PASSWORD}@example.org"
    rows = json.loads((lab.pocket / "data.json").read_text())
    rows += [{"image_file": f"{url}/a.png?token={OTHER}", "text": "a star"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    out, shown, wrong = folder / "run", [], []
    plain = lab.training(out, max_train_steps=2, report_to="tensorboard", data_json_file=folder / "rows.json")
    plain |= {"data_root_path": lab.pocket / "images", "max_fault_rate": 0.5}
    leaks: list[tuple[str, int, dict[str, Any], list[object]]] = [
        ("train", 0, plain, []),
        ("check", 0, {name: plain[name] for name in ("data_json_file", "data_root_path", "max_fault_rate")}, []),
        ("export", 0, {"output": folder / "a.safetensors"}, [out]),
        ("inspect", 0, {"json": True}, [folder / "a.safetensors"]),
        ("train", 2, plain | {"pretrained_model_name_or_path": f"{url}/base"}, []),
        ("train", 2, plain | {"tracker_project_name": TOKEN, "output_dir": folder / "other"}, []),
        ("train", 2, plain | {"hf_token": TOKEN, "output_dir": folder / "other"}, []),
        ("train", 2, plain | {"grid_prompt": OTHER, "output_dir": folder / "other"}, []),
        ("train", 2, {"config": folder / "settings.yaml"}, []),
        ("export", 2, {"output": folder / "b.bin", "image_encoder_path": f"{url}/e", "debug": True}, [out]),
        ("generate", 2, {"adapter": f"{url}/a.bin", "image": "x.png"}, []),
        ("prepare", 2, {**lab.inputs, "data_root_path": url, "prepared_dir": folder / "set"}, []),
    ]
    (folder / "settings.yaml").write_text(f"data_root_path: {url}\n")
    for command, expected, settings, named in leaks:
        code, said = lab.run(command, settings, operands=named, environment=known)
        shown.append(said)
        if code != expected:
            wrong.append(f"{command} exit {code}, not {expected}")
    (folder / "settings.yaml").unlink()
    (folder / "rows.json").unlink()
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    kept |= {f"what {leaks[number][0]} {number} said": said.encode() for number, said in enumerate(shown)}
    found = [name for name, text in kept.items() if any(s.encode() in text for s in (TOKEN, PASSWORD, OTHER))]
    note = f"{len(leaks)} commands with secrets in environment, flags, settings and rows; {len(files)} files"
    note += f" and all that was said: {len(found)} hold one{_told(found + wrong)}"
    yield Finding("tokens and passwords", len(leaks), len(found) + len(wrong), not found and not wrong, note)
