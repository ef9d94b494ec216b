"""The three readers of adapter files, and the reasons why one cannot use a file as intended.

Checked against diffusers 0.42 (`loaders/unet.py`), tencent-ailab/IP-Adapter (`ip_adapter/ip_adapter.py`) and
cubiq/ComfyUI_IPAdapter_plus (`IPAdapterPlus.py`, `utils.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ip_adapter_trainer.adapter_files.card import AdapterCard
from ip_adapter_trainer.adapter_files.file import AdapterFile
from ip_adapter_trainer.adapter_files.guess import Foreign
from ip_adapter_trainer.adapter_files.tables import Origin
from ip_adapter_trainer.layouts import Reader

READERS: dict[Reader, str] = {
    "diffusers": "diffusers",
    "original": "the original code",
    "comfy": "ComfyUI_IPAdapter_plus",
}


def refusals(file: AdapterFile) -> dict[Reader, str]:
    """Return, for each reader that cannot use the file, the first reason."""
    layout = file.layout.refusals(file.layer_shapes, file.facts["context_dim"])
    reasons = [_of_origin(file.origin), _of_encoder(file.card), layout, file.variant.refusals(file.shapes)]
    return _first([*reasons, _of_path(file.path, is_unnorm=False)])


def foreign_refusals(kind: Foreign, path: Path) -> dict[Reader, str]:
    """Return, for each reader that cannot use a file of a kind that is not trained here, the first reason."""
    return _first([dict(kind.refusals), _of_path(path, kind.is_unnorm)])


def _first(reasons: Sequence[dict[Reader, str]]) -> dict[Reader, str]:
    first: dict[Reader, str] = {}
    for reason in reasons:
        first = reason | first
    return {reader: first[reader] for reader in READERS if reader in first}


def _of_path(path: Path, is_unnorm: bool) -> dict[Reader, str]:
    """Return ComfyUI's reason: it recognises adapters of un-normalised face embeddings by their path with folders."""
    has_mark = "unnorm" in os.path.abspath(path).lower()  # noqa: PTH100 (links are not followed)
    if has_mark and not is_unnorm:
        return {"comfy": "takes a file for a face adapter when its path, with all folders, has 'unnorm' in it"}
    if is_unnorm and not has_mark:
        return {"comfy": "takes it for a Plus adapter unless its path has 'unnorm' in it: put that into the name"}
    return {}


def _of_origin(origin: Origin) -> dict[Reader, str]:
    if origin == "published":
        return {}
    if origin == "comfy":
        reason = "does not look for weights under adapter_modules; export the file"
        return {"diffusers": reason, "original": reason}
    return dict.fromkeys(get_args(Reader), "takes no training checkpoint; export it")


def _of_encoder(card: AdapterCard | None) -> dict[Reader, str]:
    """Return the reasons of readers that run CLIP only; diffusers takes any features as `ip_adapter_image_embeds`."""
    if card is None or card.image_encoder == "clip":
        return {}
    why = f"runs CLIP image encoders, and the adapter reads features of a {card.image_encoder} encoder"
    return {"original": why, "comfy": why}
