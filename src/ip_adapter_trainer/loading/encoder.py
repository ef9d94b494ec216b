"""Image encoders, and the CLIP model that scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ip_adapter_trainer.core.errors import Problem, as_load_problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.encoders import ENCODERS, ImageEncoder
from ip_adapter_trainer.loading.config import BaseConfig
from ip_adapter_trainer.loading.hub import find, here, is_local
from ip_adapter_trainer.loading.text import load_tokenizer
from ip_adapter_trainer.loading.weights import (
    SPARE,
    is_wrapped,
    load_module,
    names_of,
    read_config,
    wanted_weights,
    weights_in,
)

_PART = "the image encoder"
_SCORER = "the CLIP model that scores"
_CONFIG, _PREPROCESSING = "config.json", "preprocessor_config.json"
_REMEDY = (
    "give a folder or hub id of a CLIPVisionModelWithProjection, such as h94/IP-Adapter/models/image_encoder "
    "(ViT-H/14) or laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
)


def load_encoder(
    name: str,
    config: BaseConfig | None = None,
    *,
    features: Sequence[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ImageEncoder:
    """Load an image encoder, whole but for what the features that are asked for do not read.

    Args:
        name: folder or hub id, either with the folder within it; one named `image_encoder` is found by itself.
        config: which files of it.
        features: names of those that are going to be read.
        dtype: of the weights.
        device: where it is kept.

    Raises:
        Problem: nothing there, another kind of model, or one that is not whole.
    """
    import transformers

    config = config or BaseConfig()
    folder = _folder_of(name, config)
    settings = read_config(folder, _PART)
    entry = _entry_of(settings, str(folder))
    files = weights_in(folder, config.weights_variant, _PART)
    if files.variant != config.weights_variant:
        asked, taken = config.weights_variant or "plain", files.variant or "plain"
        say(f"{_PART} has no {asked} weights: taking the {taken} ones")
    unread = entry.unread(settings, names_of(files, _PART), features)
    spare = f"{SPARE}|{entry.spare}" if entry.spare else SPARE
    kind = getattr(transformers, entry.model_class)
    try:
        model = load_module(kind, files, _PART, dtype=dtype, spare=spare, unread=unread)
    except Problem as problem:
        if "visual_projection.weight" not in problem.fault.what:
            raise
        remedy = f"{problem.fault.remedy}; --variant plus and full read no projection"
        raise problem.but(remedy=remedy) from problem
    return entry(model.to(device), folder, name, is_mended=is_wrapped(files, _PART))


def load_encoders(
    needs: Sequence[Need],
    image_encoder: str,
    own: Part,
    config: BaseConfig | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> dict[str, ImageEncoder]:
    """Load the encoders that a variant needs, by role; see `load_encoder`.

    `image_encoder` is that of the role `image`; the variant's `own` settings name those of other roles, such as
    `face_encoder_path` that of `face`.
    """
    loaded = {}
    for role in dict.fromkeys(need.role for need in needs):
        path = image_encoder if role == "image" else str(getattr(own, f"{role}_encoder_path"))
        features = [need.feature for need in needs if need.role == role]
        loaded[role] = load_encoder(path, config, features=features, dtype=dtype, device=device)
    return loaded


def _folder_of(name: str, config: BaseConfig) -> Path:
    """Return the folder with the encoder's config.json."""
    repository, inner = _split(name, config.image_encoder_subfolder)
    inners = [inner] if inner else ["", "image_encoder"]

    def wanted(listed: Sequence[str]) -> list[str]:
        """Return a repository's files of the encoder."""
        found = next((i for i in inners if _within(i, _CONFIG) in listed), None)
        if found is None:
            raise _without_settings(name, [n.removesuffix(f"/{_CONFIG}") for n in listed if n.endswith(f"/{_CONFIG}")])
        weights = wanted_weights(listed, found, config.weights_variant, _PART, name)
        preprocessing = [file for file in listed if file == _within(found, _PREPROCESSING)]
        return [_within(found, _CONFIG), *preprocessing, *weights]

    path = find(repository, _PART, wanted, given=name)
    if path.is_file():
        remedy = f"put it beside its {_CONFIG}, and name the folder"
        raise Problem("an image encoder is a folder, and this is a file", where=name, remedy=remedy)
    for inner in inners:
        if (path / inner / _CONFIG).is_file():
            return path / inner
    if any(path.glob("open_clip*")):
        remedy = f"take transformers' form: {_REMEDY}"
        raise Problem(f"{_PART} is in open_clip's own layout", where=str(path), remedy=remedy)
    found = [file.parent for file in (*path.glob(f"*/{_CONFIG}"), *path.glob(f"*/*/{_CONFIG}"))]
    raise _without_settings(name, [folder.relative_to(path).as_posix() for folder in found if _is_encoder(folder)])


def _is_encoder(folder: Path) -> bool:
    try:
        kind = read_config(folder, _PART).get("model_type")
    except Problem:
        return False
    return any(kind in entry.known_as for _, entry in ENCODERS.items())


def _without_settings(name: str, others: Sequence[str]) -> Problem:
    what = f"{_PART} has no {_CONFIG}, the settings without which nothing can be loaded"
    likely = sorted(others, key=lambda folder: ("image_encoder" not in folder, folder))[:3]
    named = f"name the folder with --image_encoder_subfolder: {' or '.join(likely)}"
    return Problem(what, where=name, remedy=named if others else _REMEDY)


def _within(folder: str, file: str) -> str:
    return f"{folder.strip('/')}/{file}" if folder else file


def _split(name: str, inner: str | None) -> tuple[str, str | None]:
    """Return a folder or hub id and what lies within it: `owner/name/a/b` is the folder a/b of a repository."""
    inner = inner.strip("/") if inner else inner
    first, *rest = name.rstrip("/").split("/")
    is_path = here(name, _PART) is not None or len(rest) < 2 or is_local(f"{first}/{rest[0]}")
    if is_path:
        return name, inner
    return f"{first}/{rest[0]}", "/".join([*rest[1:], *([inner] if inner else [])])


def _entry_of(settings: dict[str, Any], where: str) -> type[ImageEncoder]:
    """Return the encoder whose config.json this is; one that does not say is CLIP's."""
    kind = settings.get("model_type", "clip")
    for _, entry in ENCODERS.items():
        if kind in entry.known_as:
            return entry
    known = sorted(name for _, entry in ENCODERS.items() for name in entry.known_as)
    names = settings.get("architectures") or [kind]
    what = f"{_PART} is a {names[0]} ({kind}), and none of {', '.join(known)}"
    raise Problem(what, where=where, remedy=_REMEDY)


def load_scorer(name: str) -> tuple[Any, Any, Any]:
    """Load the CLIP model that scores, of a folder or hub id, whole, in fp32, with its tokenizer and preprocessing.

    Raises:
        Problem: no CLIP model, tokenizer and preprocessing there, or not whole.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel

    def wanted(listed: Sequence[str]) -> list[str]:
        """Return a repository's files of the model."""
        small = [file for file in listed if "/" not in file and file.endswith((".json", ".txt"))]
        return [*small, *wanted_weights(listed, "", None, _SCORER, name)]

    folder = find(name, _SCORER, wanted)
    remedy = "give --clip_model a folder or hub id of a CLIPModel with its tokenizer and preprocessor"
    with as_load_problem(_SCORER, name, remedy):
        processor = CLIPImageProcessorPil.from_pretrained(str(folder))
    settings = read_config(folder, _SCORER)
    if settings.get("model_type", "clip") != "clip":
        what = f"{_SCORER} is a {settings['model_type']}, and a CLIPModel with both halves is needed"
        raise Problem(what, where=name, remedy=remedy)
    model = load_module(CLIPModel, weights_in(folder, None, _SCORER), _SCORER, dtype=torch.float32)
    side_px = int(model.config.vision_config.image_size)
    blank = Image.new("RGB", (side_px, side_px + 8))
    found = processor(images=[blank], return_tensors="pt")["pixel_values"].shape[-2:]
    if tuple(found) != (side_px, side_px):
        what = f"{_SCORER} takes images of {side_px} px, its preprocessor makes {found[0]} x {found[1]}"
        raise Problem(what, where=f"{name}/preprocessor_config.json", remedy="copy or download the folder again")
    return model, load_tokenizer(folder, model.config.text_config.to_dict(), f"{_SCORER}: its tokenizer"), processor
