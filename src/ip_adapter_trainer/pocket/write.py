"""The packed pocket base: read from the package, and written as ordinary folders for anyone to try."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import quiet_loading
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.pocket import models, world
from ip_adapter_trainer.pocket.config import PocketConfig
from ip_adapter_trainer.pocket.world import Scene

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionModelWithProjection


VALIDATION_ROWS = 32


def assemble(vae: Any, unet: Any, clip: CLIPModel) -> Any:
    """Make an ordinary StableDiffusionPipeline of the parts; the text encoder is CLIP's own text tower."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    text = CLIPTextModel(clip.config.text_config)
    before = "" if hasattr(text, "embeddings") else "text_model."  # as older releases of transformers nest it
    text.load_state_dict({before + key: value for key, value in clip.text_model.state_dict().items()})
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text.eval(), tokenizer=models.tokenizer(), scheduler=models.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_encoder(clip: CLIPModel) -> CLIPVisionModelWithProjection:
    """Return CLIP's image tower with its projection."""
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection(clip.config.vision_config)
    wanted = encoder.state_dict()
    encoder.load_state_dict({key: value for key, value in clip.state_dict().items() if key in wanted})
    return encoder.eval()


def _require_weights() -> Path:
    quiet_loading()
    folder = models.weights_dir()
    if not (folder / "build.json").exists():
        remedy = "install ip_adapter_trainer anew: its wheel and its repository hold them"
        raise Problem("this installation has no pocket weights", where=str(folder), remedy=remedy)
    return folder


def clip() -> CLIPModel:
    """Load the packed CLIP, both towers."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(_require_weights() / "clip").eval()


def pipeline() -> Any:
    """Load the packed base as a pipeline, fp32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = _require_weights()
    vae, unet = AutoencoderKL.from_pretrained(folder / "vae"), UNet2DConditionModel.from_pretrained(folder / "unet")
    return assemble(vae.eval(), unet.eval(), clip())


def training_pairs(seed: int, count: int) -> list[tuple[Scene, Scene]]:
    """Return target and image prompt for each row: the same but for the shape and the pose.

    A prompt that shows the target itself would also tell its shape; another shape teaches the adapter to leave the
    shape to the text.
    """
    return _pairs(seed, "pocket-pairs", count, held=False)


def validation_pairs(seed: int, count: int) -> list[tuple[Scene, Scene]]:
    """Return pairs like `training_pairs`, of combinations of attributes that no training target has."""
    return _pairs(seed, "pocket-validation", count, held=True)


def _pairs(seed: int, purpose: str, count: int, *, held: bool) -> list[tuple[Scene, Scene]]:
    rng = stream(seed, purpose)
    pairs = []
    for _ in range(count):
        target = world.random_scene(rng, held=held)
        shapes = [shape for shape in world.SHAPES if not held or world.held_out(replace(target, shape=shape))]
        pairs.append((target, world.random_pose(replace(target, shape=str(rng.choice(shapes))), rng)))
    return pairs


def write_pairs(
    folder: Path, pairs: list[tuple[Scene, Scene]], images: str = "images", rows: str = "data.json"
) -> None:
    """Write images, and rows in the published format with a prompt image; captions name the shape only."""
    from PIL import Image

    (folder / images).mkdir(parents=True, exist_ok=True)
    table = []
    for number, (target, prompt) in enumerate(pairs):
        names = [f"{number:05d}.png", f"{number:05d}_prompt.png"]
        for name, scene in zip(names, (target, prompt), strict=True):
            Image.fromarray(world.render(scene)).save(folder / images / name)
        text = world.caption(target, ["shape"])
        table.append({"image_file": names[0], "text": text, "prompt_image_file": names[1]})
    (folder / rows).write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")


def write_pocket(folder: Path, *, rows: int = 2000, seed: int = 0) -> None:
    """Write models, a training set and a validation set into a folder, ready for every command."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline().save_pretrained(folder / "base")
    towers = clip()
    image_encoder(towers).save_pretrained(folder / "image_encoder")
    towers.save_pretrained(folder / "clip")
    models.tokenizer().save_pretrained(folder / "clip")
    models.image_processor().save_pretrained(folder / "clip")
    write_pairs(folder, training_pairs(seed, rows))
    write_pairs(folder, validation_pairs(seed, VALIDATION_ROWS), "validation", "validation/data.json")


def pocket(config: PocketConfig) -> str:
    """Run `ip-adapter pocket`: write everything and return how to train on it."""
    folder = Path(config.folder)
    write_pocket(folder, rows=config.rows, seed=config.seed)
    return (
        f"{folder}/base            Stable Diffusion pipeline, {world.SIZE_PX} px\n"
        f"{folder}/image_encoder   CLIP image encoder\n"
        f"{folder}/clip            both CLIP towers, for `ip-adapter evaluate --clip_model`\n"
        f"{folder}/data.json       {config.rows} rows over {folder}/images\n"
        f"{folder}/validation      {VALIDATION_ROWS} rows of combinations that no training target has (data.json)\n\n"
        f"ip-adapter train --pretrained_model_name_or_path={folder}/base \\\n"
        f"  --image_encoder_path={folder}/image_encoder \\\n"
        f"  --data_json_file={folder}/data.json --data_root_path={folder}/images --resolution={world.SIZE_PX} \\\n"
        f"  --validation_data={folder}/validation/data.json \\\n"
        f"  --max_train_steps=400 --train_batch_size=32 --learning_rate=1e-3 --min_timestep=400 \\\n"
        f"  --output_dir={folder}/adapter"
    )
