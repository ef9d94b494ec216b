"""Hostile YAML settings, lists of faults, and checkpoints whose hashes are true and whose state is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ip_adapter_trainer.manifest.faults import FILE_NAME as FAULTS
from ip_adapter_trainer.storage.checkpoints import MANIFEST, sha256_of

WEIGHTS, TENSORS, STATE, CARD = "pytorch_model.bin", "training_state.safetensors", "training_state.json", "adapter.json"
FILES = (WEIGHTS, TENSORS, STATE, CARD, MANIFEST)
FOREIGN = ("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", ".metadata", "model.pt")
Damage = Callable[[Path], object]


def settings(marker: Path) -> Iterator[tuple[str, str]]:
    """YAML texts that are refused as a run's settings; some would make the file `marker`."""
    touch = f"touch {marker}"
    yield "python/object/apply", f"seed: !!python/object/apply:os.system ['{touch}']"
    yield "python/object/new", f"seed: !!python/object/new:os.system ['{touch}']"
    yield "python/name", "seed: !!python/name:os.system"
    yield "python/module", "seed: !!python/module:antigravity"
    yield "python/tuple", "adapter_layers: !!python/tuple [all]"
    yield "a local tag", "seed: !exec 1"
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    yield "billion laughs", "\n".join([*lines, "adapter_layers: *i"])
    merges = ["a: &a {x: 1}"]
    merges += [f"{n}: &{n} {{<<: [{','.join([f'*{o}'] * 9)}]}}" for o, n in zip("abcdefgh", "bcdefghi", strict=True)]
    yield "billion merges", "\n".join(merges)
    yield "itself", "adapter_layers: &a [*a]"
    yield "nested 20,000 deep", "adapter_layers: " + "[" * 20_000
    yield "nested mappings", "a: {b: {c: {d: {e: 1}}}}"
    yield "a number of 5,000 digits", "seed: " + "9" * 5000
    yield "a number of 10^30", "train_batch_size: 1" + "0" * 30
    yield "a batch of 10^12", "train_batch_size: 1" + "0" * 12
    yield "pictures of 10^7 pixels a side", "resolution: 10000000"
    yield "a million workers", "dataloader_num_workers: 1000000"
    yield "sexagesimal", "train_batch_size: 99999999:59:59:59:59:59"
    yield "infinity", "learning_rate: .inf"
    yield "not a number", "learning_rate: .nan"
    yield "no date", "output_dir: 2001-99-99"
    yield "binary", "output_dir: !!binary x"
    yield "no float", "learning_rate: !!float x"
    yield "unknown key", "learning_rat: 1"
    yield "a key that is no name", "[1, 2]: 3"
    yield "a number for a key", "1: 2"
    yield "a flag in a list", f"adapter_layers: [all, --tyro-write-completion, bash, {marker}]"
    yield "a setting in a list", "adapter_layers: [all, --seed=7]"
    yield "a short flag in a list", f"adapter_layers: [all, -o, {marker}]"
    yield "a dotted path for a class", "variant: os.system"
    yield "a path for a family", "family: ../../etc"
    yield "two documents", "seed: 1\n---\nseed: 2"
    yield "a list", "- seed"
    yield "NUL", "seed: \0"
    yield "no UTF-8", "seed: \udcff"
    yield "10 MB", "# " + "x" * 10**7
    yield "a token", "tracker_project_name: hf_" + "a1B2" * 9
    yield "a password", "data_root_path: https://user:open-sesame@example.org/images"


def sign(folder: Path) -> None:
    """Writes a checkpoint's manifest anew, so that its hashes are true."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name in FILES[:-1])
    entries = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries))


def write_into(name: str, content: bytes, folder: Path) -> None:
    """Writes a file of a folder."""
    (folder / name).write_bytes(content)


def _without(key: str, saved: dict[str, Any]) -> None:
    saved["state"].pop(key)


def _garbled(key: str, saved: dict[str, Any]) -> None:
    if key == "rows":
        saved.clear()
    else:
        saved["state"][key] = "x"


def checkpoints(payload: bytes) -> Iterator[tuple[str, Damage]]:
    """What is done to a good checkpoint's folder, by name; none of the results may be taken up."""
    for name in FILES:
        yield f"a pickle for {name}", _signed(partial(write_into, name, payload))
    yield "no weights", _signed(lambda f: (f / WEIGHTS).unlink())
    yield "weights that the manifest passes over", _entry(WEIGHTS, None)
    yield "state that the manifest passes over", _entry(STATE, None)
    yield "a manifest that names a device", _entry("/dev/zero", {"sha256": "0", "bytes": 0})
    yield "a manifest that names another folder", _outside
    yield "a manifest nested 100,000 deep", lambda f: (f / MANIFEST).write_text("[" * 100_000)
    yield "a manifest of a list", lambda f: (f / MANIFEST).write_text("[]")
    yield "an empty manifest", lambda f: (f / MANIFEST).write_text("{}")
    yield "a manifest of 100 MB", lambda f: (f / MANIFEST).write_text("{" + " " * 10**8 + "}")
    yield "state nested 100,000 deep", _signed(lambda f: (f / STATE).write_text("[" * 100_000))
    yield "state of a list", _signed(lambda f: (f / STATE).write_text("[]"))
    yield "state of 100 MB", _signed(lambda f: (f / STATE).write_text('{"step": 1' + " " * 10**8 + "}"))
    for key in ("config", "rows", "images_per_step", "optimizer", "validated"):
        yield f"state without {key}", _state(partial(_without, key))
        yield f"text for {key}", _state(partial(_garbled, key))
    yield "a step of 10^30", _state(lambda s: s.update(step=10**30))
    yield "a negative step", _state(lambda s: s.update(step=-5))
    yield "a step of text", _state(lambda s: s.update(step="1"))
    yield "a warm-up of text", _state(partial(_garbled, "warmup_steps"))
    yield "a negative warm-up", _state(lambda s: s["state"].update(warmup_steps=-1))
    yield "a tensor that is not there", _state(lambda s: s["state"].update(optimizer={"__tensor__": "state.none"}))
    yield "a parameter that is not there", _state(lambda s: s["state"]["optimizer"]["__int_keys__"].update({"999": {}}))
    yield "a number of 5,000 digits", _state(lambda s: s["state"]["optimizer"]["__int_keys__"].update({"9" * 5000: {}}))
    yield "moments of another shape", _signed(_moments)
    yield "weights of another shape", _signed(lambda f: _weights(f, lambda t: torch.zeros(1)))
    yield (
        "weights that are read 10^12 times",
        _signed(lambda f: _weights(f, lambda t: torch.zeros(1).expand(10**6, 10**6))),
    )
    yield "weights in nested tables", _signed(lambda f: torch.save({"a": {"b": {"c": torch.zeros(1)}}}, f / WEIGHTS))


def fault_lists() -> Iterator[tuple[str, Damage]]:
    """What is put in the place of the list of a run's faults, in its folder."""
    good = {"kind": "truncated", "what": "x", "where": "data.json, element 1", "remedy": "y"}
    for name, content in (
        ("a byte of no UTF-8", b"\x80\n"),
        ("NUL", bytes(100)),
        ("a list for a kind", json.dumps({**good, "kind": []}).encode()),
        ("an object for a place", json.dumps({**good, "where": {}}).encode()),
        ("a number for what it is", json.dumps({**good, "what": 1}).encode()),
        ("other keys", b'{"__class__": "os.system"}'),
        ("no object", b"[1]\n1\nnull"),
        ("nested 100,000 deep", b"[" * 100_000),
        ("objects nested 100,000 deep", b'{"kind":' * 100_000),
        ("a number of 5,000 digits", json.dumps(good).encode()[:-1] + b', "n": ' + b"9" * 5000 + b"}"),
    ):
        yield name, partial(write_into, FAULTS, content)
    yield "a pipe that nobody writes", lambda f: os.mkfifo(f / FAULTS)


def _signed(damage: Damage) -> Damage:
    def done(folder: Path) -> None:
        damage(folder)
        if not (folder / MANIFEST).read_bytes().startswith(b"\x80"):
            sign(folder)

    return done


def _entry(name: str, entry: dict[str, Any] | None) -> Damage:
    def done(folder: Path) -> None:
        entries = json.loads((folder / MANIFEST).read_text())
        entries.pop(name, None)
        (folder / MANIFEST).write_text(json.dumps(entries if entry is None else {**entries, name: entry}))

    return done


def _outside(folder: Path) -> None:
    """True size and hash, of a file that is none of the checkpoint's."""
    beside = folder.parent / "beside.txt"
    beside.write_bytes(b"x")
    _entry(f"../{beside.name}", {"sha256": sha256_of(beside), "bytes": 1})(folder)


def _state(change: Callable[[dict[str, Any]], object]) -> Damage:
    def done(folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        change(state)
        (folder / STATE).write_text(json.dumps(state))

    return _signed(done)


def _moments(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({n: t[:1].clone() if n.endswith("exp_avg") else t for n, t in tensors.items()}, folder / TENSORS)


def _weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    first = next(iter(weights))
    torch.save({**weights, first: change(weights[first])}, folder / WEIGHTS)
