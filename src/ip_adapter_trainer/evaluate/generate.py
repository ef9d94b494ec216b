"""`ip-adapter generate`: pictures from an image prompt, each a PNG that says how it was made."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ip_adapter_trainer.adapter_files import weights_sha256
from ip_adapter_trainer.card import package_version
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.evaluate.config import GenerateConfig
from ip_adapter_trainer.evaluate.sample import image_features, sample
from ip_adapter_trainer.evaluate.start import load, sampling
from ip_adapter_trainer.images.decode import ImageFault, decode
from ip_adapter_trainer.images.limits import Limits
from ip_adapter_trainer.model import Adapter
from ip_adapter_trainer.runtime.progress import Progress


def generate(config: GenerateConfig) -> list[Path]:
    """Draw `num_images` images and return their files; what is drawn is kept if the rest fails.

    Raises:
        Problem: a picture that cannot be read, an output that cannot be written, a model that does not load.
    """
    references = [read_image(Path(name)) for name in config.image]  # before the minutes of loading a model
    seeds = [config.seed + number for number in range(config.num_images)]
    files = output_files(Path(config.output), seeds)
    model = load(config)
    how, features = sampling(config, model), image_features(model, [references])
    facts = _facts(config, model.adapter) | {"size": f"{how.width_px}x{how.height_px}"}
    with Progress(len(seeds), "picture") as progress:
        for start in range(0, len(seeds), config.batch_size):
            part = seeds[start : start + config.batch_size]
            drawn = sample(model, features, [config.prompt] * len(part), part, how)
            for file, seed, image in zip(files[start:], part, drawn, strict=False):
                _save(image, file, facts | {"seed": str(seed)})
            progress.update(len(part))
    return files


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright RGB.

    Raises:
        Problem: there is none to be had.
    """
    try:
        return decode(path, Limits()).image
    except ImageFault as error:
        raise Problem(error.fault.what, where=str(path), remedy="name another picture with --image") from error


def output_files(output: Path, seeds: list[int]) -> list[Path]:
    """Return one file for each seed: a PNG file as named, numbered if there are several; in a folder, free names.

    Raises:
        Problem: another suffix than .png, or a folder that cannot be made.
    """
    suffix = output.suffix.lower()
    is_file = not output.is_dir() and suffix == ".png"
    if not is_file and suffix in Image.registered_extensions() and not output.is_dir():
        remedy = "name a .png file, which can say how it was made, or a folder"
        raise Problem(f"pictures are not written as {suffix}", where=str(output), remedy=remedy)
    folder = output.parent if is_file else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot make the output folder: {error.strerror}"
        raise Problem(why, where=str(folder), remedy="choose another --output") from error
    if is_file:
        return [output.with_stem(f"{output.stem}-{seed}") if len(seeds) > 1 else output for seed in seeds]
    begin = [file.name.split("-")[0] for file in folder.iterdir()]
    free = count(max((int(number) for number in begin if number.isdecimal()), default=0) + 1)
    return [folder / f"{number:04d}-{seed}.png" for number, seed in zip(free, seeds, strict=False)]


def _facts(config: GenerateConfig, adapter: Adapter) -> dict[str, str]:
    """Return what is written into every image's file about its making; of files the names only, not the folders."""
    return {
        "prompt": config.prompt,
        "negative_prompt": config.negative_prompt,
        "image": ", ".join(Path(name).name for name in config.image),
        "scale": f"{config.scale:g}",
        "guidance_scale": f"{config.guidance_scale:g}",
        "num_inference_steps": str(config.num_inference_steps),
        "scheduler": config.scheduler,
        "adapter": Path(config.adapter).name,
        "adapter_sha256": weights_sha256(adapter.published()),
        "Software": f"ip_adapter_trainer {package_version()}",
    }


def _save(image: Image.Image, file: Path, facts: dict[str, str]) -> None:
    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, value)
    try:
        image.save(file, pnginfo=info)
    except OSError as error:
        what = f"cannot write the picture: {error.strerror}"
        raise StorageProblem(what, where=str(file), remedy="make room, or choose another --output") from error
