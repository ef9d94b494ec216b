"""Checkpoints in one file, in the layout of the original code, as civitai has them: told apart, checked, converted.

The conversion is that of diffusers' `from_single_file`, which by itself leaves what a file lacks without storage and
passes over what it does not know; here both are told. Settings and tokenizers come from a pipeline folder or the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem, as_load_problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.loading.weights import damaged, load_tensors, read_config, some

# What the names of each part's weights begin with.
_BEGINNINGS: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_WORDS = {"unet": "a UNet", "vae": "a VAE", "text_encoder": "a text encoder", "text_encoder_2": "a second text encoder"}
_EDM = ("edm_mean", "edm_vpred.sigma_max")  # Playground v2.5, CosXL
_BESIDE = r"\.(loss|model_ema)\."  # of training, beside the weights
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")  # of SD2.x and SDXL
_PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}  # of kohya's metadata
_REMEDY = "take the whole checkpoint, or a diffusers pipeline folder"


@dataclass(frozen=True)
class OneFile:
    """A checkpoint in one file."""

    path: Path  # of the file
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of all its tensors, by their names
    metadata: Mapping[str, str] = field(repr=False)  # of its header

    @classmethod
    def open(cls, path: Path) -> OneFile:
        """Read the header of a file.

        Raises:
            Problem: no .safetensors file, or a damaged one.
        """
        if path.suffix != ".safetensors":
            what = f"a checkpoint in one file is read as .safetensors only, not {path.suffix or 'without a suffix'}"
            raise Problem(what, where=str(path), remedy="take its .safetensors form: others can run code when loaded")
        try:
            with safe_open(path, "pt") as opened:
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
                return cls(path, shapes, opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise damaged(path, "the checkpoint", error) from error

    def has(self, part: str) -> bool:
        """Return whether there are weights of a part."""
        return any(key.startswith(_BEGINNINGS[part]) for key in self.shapes)

    def demand_whole(self, *, has_vae: bool) -> None:
        """Demand weights of every part, of a VAE where none is given beside the file.

        Raises:
            Problem: there are none of one of them; the file is said to be what it is.
        """
        is_xl = any(key.startswith("conditioner.") for key in self.shapes)
        parts = ["unet", "text_encoder", *(["text_encoder_2"] if is_xl else []), *(["vae"] if has_vae else [])]
        lacking = [part for part in parts if not self.has(part)]
        if not lacking:
            return
        held = [words for part, words in _WORDS.items() if self.has(part)]
        holds = f"{' and '.join(held)} only" if held else f"other weights: {some(list(self.shapes))}"
        lacks = " and ".join(_WORDS[part] for part in lacking)
        what = f"this file is no whole checkpoint: it lacks {lacks}, and holds {holds}"
        beside = self.path.parent.parent
        is_part = not held and (beside / "model_index.json").exists()
        raise Problem(what, where=str(self.path), remedy=f"give the pipeline folder {beside}" if is_part else _REMEDY)

    def settings_repository(self) -> str:
        """Return the hub id that diffusers takes the settings of such a checkpoint from."""
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        meta = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return str(fetch_diffusers_config(meta)["pretrained_model_name_or_path"])

    def noise(self, overruled: Mapping[str, Any], *, is_stated: bool) -> dict[str, Any]:
        """Return the scheduler settings that the file's own keys tell of; a line says so.

        Those that the user gave overrule them; `is_stated` tells whether what is predicted is known otherwise.

        Raises:
            Problem: another noise process, or none that could be known.
        """
        if edm := [key for key in _EDM if key in self.shapes]:
            what = f"the checkpoint was trained with EDM's noise (it has {edm[0]}), which is not trained here"
            raise Problem(what, where=str(self.path), remedy="take another base model")
        told: dict[str, Any] = {}
        if "v_pred" in self.shapes:
            told["prediction_type"] = "v_prediction"
        elif (said := self.metadata.get("modelspec.prediction_type")) in _PREDICTIONS:
            told["prediction_type"] = _PREDICTIONS[str(said)]
        if "ztsnr" in self.shapes:
            told["rescale_betas_zero_snr"] = True
        if kept := {name: value for name, value in told.items() if name not in overruled}:
            say(f"{self.path.name} says of itself: {', '.join(f'{name} {value}' for name, value in kept.items())}")
        is_known = is_stated or "prediction_type" in told
        if not is_known and any(key.startswith(_OPEN_CLIP[0]) for key in self.shapes):
            what = "nothing in this SD2.x checkpoint tells what it predicts: noise (512 px models) or v (768 px models)"
            raise Problem(what, where=str(self.path), remedy="give --prediction_type epsilon or v_prediction")
        return told

    def module(self, kind: Any, part: str, settings: Path, dtype: torch.dtype, spare: str) -> Any:
        """Load one part by its name, converted, whole; see `load_module`.

        Raises:
            Problem: weights are missing, left over or of another shape.
        """
        name, where = f"the checkpoint's {part}", str(self.path)
        beginnings = _BEGINNINGS[part]
        with as_load_problem(name, where, _REMEDY), safe_open(self.path, "pt") as opened:
            held = {key: opened.get_tensor(key) for key in self.shapes if key.startswith(beginnings)}
        converted = _converted(held, part, read_config(settings, name), name, where)
        counted = [key for key in held if not re.search(_BESIDE, key)]
        if part in ("unet", "vae") and len(converted) != len(counted):  # one to one; others are passed over
            what = f"{name} has {len(counted)} weights, of which its settings know places for {len(converted)}"
            raise Problem(what, where=where, remedy="give the --base_config of a model of its kind")
        try:
            return load_tensors(kind, converted, settings, name, where, dtype=dtype, spare=spare)
        except Problem as problem:  # weights that lack nothing may still meet settings of another model
            remedy = f"{problem.fault.remedy}; or give the --base_config of a model of its kind"
            raise problem.but(remedy=remedy) from problem


def _converted(
    held: dict[str, Tensor], part: str, settings: Mapping[str, Any], name: str, where: str
) -> dict[str, Tensor]:
    """Return the weights of one part under the names of diffusers or transformers."""
    from diffusers.loaders import single_file_utils as convert

    made: dict[str, Tensor]
    try:
        if part == "unet":
            made = convert.convert_ldm_unet_checkpoint(held, settings)
        elif part == "vae":
            made = convert.convert_ldm_vae_checkpoint(held, settings)
        elif prefix := next((prefix for prefix in _OPEN_CLIP if any(key.startswith(prefix) for key in held)), None):
            made = convert.convert_open_clip_checkpoint(_OpenClip(settings), held, prefix=prefix)
        else:
            made = convert.convert_ldm_clip_checkpoint(held)
    except KeyError as error:
        remedy = f"{_REMEDY}; or give the --base_config of a model of its kind"
        raise Problem(f"{name} lacks {error.args[0]}", where=where, remedy=remedy) from error
    return made


class _OpenClip:
    """Settings that the conversion of OpenCLIP's weights asks a model for."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.config = SimpleNamespace(hidden_size=settings.get("hidden_size", 512))
