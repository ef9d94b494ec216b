"""The readers of our own formats as functions of bytes: what the fuzzers call. Anything but a `Problem` is a find."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from faults.corpus import documents, mutate, tensors
from faults.corpus.mutate import Mutation
from ip_adapter_trainer.adapter_files import AdapterCard, read_adapter, write_adapter
from ip_adapter_trainer.cache.index import IMAGES, ImageIndex, Record, name_key
from ip_adapter_trainer.cache.shards import Table, TableWriter
from ip_adapter_trainer.config import check_keys, compose
from ip_adapter_trainer.core.errors import Fault
from ip_adapter_trainer.inspection import examine
from ip_adapter_trainer.layouts import make_layout
from ip_adapter_trainer.manifest.faults import FILE_NAME, FaultLog
from ip_adapter_trainer.manifest.manifest import read_manifest
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig
from ip_adapter_trainer.storage.checkpoints import MANIFEST, verified
from ip_adapter_trainer.storage.documents import read_yaml
from ip_adapter_trainer.train import checkpoint, restored

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A reader, a good file for it, and how such a file is mutated."""

    read: Read
    seed: bytes
    mutations: tuple[Mutation, ...]


def targets(folder: Path) -> dict[str, Target]:
    """Every target by name; their files are written in a folder, at best one in memory."""
    weights = _weights()
    card = AdapterCard(
        variant="base", variant_config={"num_tokens": 4}, family="sd", num_tokens=4, feature="image_embeds",
        pretrained_model_name_or_path="base", image_encoder_path="encoder", feature_dim=6, context_dim=8, step=1,
        images_seen=2, package_version="0",
    )  # fmt: skip
    made = {suffix: folder / f"adapter{suffix}" for suffix in (".safetensors", ".bin")}
    for path in made.values():
        write_adapter(path, weights, card.to_metadata(), make_layout("unet"))
    flat = tensors.File.read(made[".safetensors"])
    unsigned = tensors.packed(
        json.dumps({k: v for k, v in flat.header.items() if k != "__metadata__"}).encode(), flat.body
    )
    texts = ("a star", ["a star", "a red star"], None)
    rows = json.dumps([{"image_file": "a.png", "text": text, "prompt_image_file": "b.png"} for text in texts])
    lines = "".join(json.dumps(row) + "\n" for row in json.loads(rows))
    csv = 'image_file,text\r\na.png,a star\r\nb.png,"a, b"\r\n'
    only, tree, both = (mutate.of_bytes,), (mutate.of_bytes, mutate.of_json), (mutate.of_bytes, mutate.of_tensors)
    return {
        "adapter.safetensors": Target(_adapter(made[".safetensors"]), flat.packed(), both),
        "unsigned adapter.safetensors": Target(_adapter(made[".safetensors"]), unsigned, both),
        "adapter.bin": Target(_adapter(made[".bin"]), made[".bin"].read_bytes(), only),
        "adapter.json": Target(_card, card.to_json().encode(), tree),
        "shard": _shard(folder / "set"),
        **_checkpoint(folder, weights, card),
        "config.yaml": Target(_settings(folder / "config.yaml"), _YAML.encode(), only),
        "rows.json": Target(_rows(folder / "rows.json"), rows.encode(), tree),
        "rows.jsonl": Target(_rows(folder / "rows.jsonl"), lines.encode(), only),
        "rows.csv": Target(_rows(folder / "rows.csv"), csv.encode(), only),
        FILE_NAME: _faults(folder),
    }


_YAML = """\
image_encoder_path: encoder
family: sd
pretrained_model_name_or_path: base
data_json_file: rows.json
adapter_layers: [up, mid]
learning_rate: 1.0e-4
train_batch_size: 8
use_ema: true
max_train_steps: null
"""


def _weights() -> dict[str, dict[str, torch.Tensor]]:
    pairs = {f"{n}.to_{k}_ip.weight": torch.ones(8, 8) for n in (1, 3) for k in "kv"}
    names = {"proj.weight": (32, 6), "proj.bias": (32,), "norm.weight": (8,), "norm.bias": (8,)}
    return {"image_proj": {name: torch.ones(shape) for name, shape in names.items()}, "ip_adapter": pairs}


def _adapter(path: Path) -> Read:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        str(examine(path))
        read_adapter(path).config()

    return read


def _card(content: bytes) -> None:
    try:
        text = content.decode()
    except ValueError:
        return  # `AdapterCard.read` refuses it
    AdapterCard.from_json(text, "adapter.json").to_metadata()


def _shard(folder: Path) -> Target:
    writer = TableWriter(folder, IMAGES)
    for number in range(4):
        writer.add(name_key(str(number)), Record(10, 20, 30, (64, 64), bytes([number + 1]) * 16).packed())
    writer.seal()
    path = next((folder / IMAGES.folder).glob("*.safetensors"))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        table, index = Table(folder, IMAGES), ImageIndex(folder)
        places = table.find([name_key(str(number)) for number in range(4)])
        known = [place for place in places.tolist() if place >= 0]
        table.fill(table.room(max(1, len(known))), range(len(known)), known)
        assert index.find(["0"]) is not None and np.isfinite(index.sizes_px).all()

    return Target(read, path.read_bytes(), (mutate.of_bytes, mutate.of_tensors))


def _checkpoint(folder: Path, weights: dict[str, dict[str, torch.Tensor]], card: AdapterCard) -> dict[str, Target]:
    """Every file of a checkpoint but the card, hashes made true again; the manifest as it is."""
    published = {f"image_proj_model.{name}": value for name, value in weights["image_proj"].items()}
    trained = [value for _, value in sorted(published.items())]
    moments = {n: {"step": torch.ones(()), "exp_avg": value, "exp_avg_sq": value} for n, value in enumerate(trained)}
    state = {
        "config": {"seed": 0}, "rows": "00", "images_per_step": 2, "optimizer": moments, "scaler": {}, "bad_steps": 0,
        "validated": -1, "warmup_steps": 0,
    }  # fmt: skip
    home = checkpoint.write(folder, checkpoint.take(1, published, card, state))

    def reader(name: str) -> Read:
        path, good = home / name, (home / name).read_bytes()

        def read(content: bytes) -> None:
            path.write_bytes(content)
            try:
                if name == MANIFEST:
                    verified(home)
                else:
                    documents.sign(home)
                saved = checkpoint.read(home)
                restored.demand_fits(saved.weights, published, saved.state["optimizer"], trained)
            finally:
                path.write_bytes(good)
                documents.sign(home)

        return read

    kinds = {
        documents.WEIGHTS: (mutate.of_bytes,), documents.TENSORS: (mutate.of_bytes, mutate.of_tensors),
        documents.STATE: (mutate.of_bytes, mutate.of_json), MANIFEST: (mutate.of_bytes, mutate.of_json),
    }  # fmt: skip
    return {name: Target(reader(name), (home / name).read_bytes(), how) for name, how in kinds.items()}


def _settings(path: Path) -> Read:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_keys(read_yaml(str(path)), compose("base", "sd").model_fields, str(path))

    return read


def _faults(folder: Path) -> Target:
    path = folder / FILE_NAME
    FaultLog(folder, 100, 1.0).add(
        Fault("damaged", "it is broken", f"rows.json, element {n}", "mend it") for n in (1, 2)
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        FaultLog(folder, 100, 1.0).add([Fault("changed", "it is another", "rows.json, element 3", "mend it")])

    return Target(read, path.read_bytes(), (mutate.of_bytes,))


def _rows(path: Path) -> Read:
    config = CheckConfig(data_json_file=str(path), data_root_path=str(path.parent))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for fault in read_manifest(config).faults:
            str(fault)

    return read
