"""The main job from end to end on the embedded base model: rows on disk, train, export, generate, score.

The oracle asks, on pairs of held-out combinations, whether the picture took its shape from the text and everything
else from the image prompt, beside scale 0 and beside image prompts that belong to other rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.pocket import world
from ip_adapter_trainer.pocket.config import DemoConfig
from ip_adapter_trainer.pocket.world import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

    from ip_adapter_trainer.model import Model

ASKED_OF_IMAGE, ASKED_OF_TEXT = ("colour", "pattern", "background"), ("shape",)
ADAPTER_FILE = "ip-adapter_pocket.safetensors"
GRID_ROWS, GRID_BLOCKS = 6, 2
GRID_CELL_PX = (96, 512)  # three times the pictures' size: two blocks are as wide as a page


@dataclass(frozen=True)
class Pair:
    """A text that asks for one shape, and a reference image that has another shape and the other attributes wanted."""

    text_shape: str
    reference: Scene

    def truth(self) -> dict[str, str]:
        """Return the attributes of a picture that obeys both."""
        return {**self.reference.attributes(), "shape": self.text_shape}

    def prompt(self) -> str:
        """Return the text that asks for the shape."""
        return world.caption(replace(self.reference, shape=self.text_shape), ASKED_OF_TEXT)


def held_out_pairs(count: int, seed: int) -> list[Pair]:
    """Draw pairs whose reference and whose wanted picture are both combinations held out from training."""
    rng = stream(seed, "demo-pairs")
    pairs: list[Pair] = []
    while len(pairs) < count:
        reference = world.random_scene(rng, held=True)
        shape = str(rng.choice([s for s in world.SHAPES if s != reference.shape]))
        if world.held_out(replace(reference, shape=shape)):
            pairs.append(Pair(shape, reference))
    return pairs


def score(images: list[Image], pairs: list[Pair]) -> dict[str, float]:
    """Return, for each attribute, the fraction of pictures in which the oracle finds it as asked."""
    from ip_adapter_trainer.pocket import oracle

    return oracle.accuracy(np.stack([np.asarray(p.convert("RGB")) for p in images]), [p.truth() for p in pairs])


def _train(config: DemoConfig, folder: Path) -> None:
    from ip_adapter_trainer.config import parse_train, write_resolved
    from ip_adapter_trainer.train.run import train

    flags = {
        "pretrained_model_name_or_path": folder / "base", "image_encoder_path": folder / "image_encoder",
        "data_json_file": folder / "data.json", "data_root_path": folder / "images",
        "validation_data": folder / "validation" / "data.json", "grid_rows": 0,
        "output_dir": folder / "run", "resolution": world.SIZE_PX,
        "train_batch_size": config.train_batch_size, "max_train_steps": config.max_train_steps,
        "learning_rate": config.learning_rate, "lr_scheduler": "cosine", "lr_warmup_steps": 0,
        "timestep_density": "uniform", "min_timestep": config.min_timestep, "seed": config.seed,
        "resume_from_checkpoint": "latest", "mixed_precision": "no",
    }  # fmt: skip
    train(parse_train([f"--{name}={value}" for name, value in flags.items()]), write_resolved)


def _export(folder: Path) -> Path:
    from ip_adapter_trainer.export import export
    from ip_adapter_trainer.file_config import ExportConfig

    out = folder / ADAPTER_FILE
    out.unlink(missing_ok=True)
    print(export(ExportConfig(source=str(folder / "run"), output=str(out))))
    return out


def _draw(model: Model, pairs: list[Pair], references: list[Image], config: DemoConfig, scale: float) -> list[Image]:
    from ip_adapter_trainer.evaluate.sample import Sampling, image_features, sample

    how = Sampling(
        world.SIZE_PX, world.SIZE_PX, steps=config.steps, guidance_scale=config.guidance_scale, scale=scale,
        batch_images=50,
    )  # fmt: skip
    features = image_features(model, [[r] for r in references])
    return sample(model, features, [pair.prompt() for pair in pairs], [config.seed + i for i in range(len(pairs))], how)


def _grid(model: Model, pairs: list[Pair], references: list[Image], config: DemoConfig, folder: Path) -> Path:
    from ip_adapter_trainer.evaluate.grid import grid
    from ip_adapter_trainer.evaluate.sample import Sampling

    how = Sampling(world.SIZE_PX, world.SIZE_PX, steps=config.steps, guidance_scale=config.guidance_scale)
    prompts, seeds = [pair.prompt() for pair in pairs[:GRID_ROWS]], [config.seed + i for i in range(GRID_ROWS)]
    image = grid(model, references[:GRID_ROWS], prompts, seeds, how, blocks=GRID_BLOCKS, cell_px=GRID_CELL_PX)
    image.save(folder / "grid.png")
    return folder / "grid.png"


def table(scores: dict[str, dict[str, float]]) -> str:
    """Return the scores as text: a row for each attribute, a column for each condition."""
    columns = list(scores)
    lines = ["asked of  attribute   " + "".join(f"{c:>10}" for c in columns) + f"{'chance':>10}"]
    for name, values in world.ATTRIBUTES.items():
        source = "image" if name in ASKED_OF_IMAGE else "text"
        cells = "".join(f"{scores[c][name]:>10.0%}" for c in columns)
        lines.append(f"{source:<10}{name:<12}{cells}{1 / len(values):>10.0%}")
    return "\n".join(lines)


def summary(scores: dict[str, dict[str, float]], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the content of `scores.json`: fractions, and seconds by part."""

    def mean(condition: str, names: tuple[str, ...]) -> float:
        """Return the mean score of the attributes asked of one source."""
        return round(float(np.mean([scores[condition][name] for name in names])), 4)

    return {
        "image_attributes": {c: mean(c, ASKED_OF_IMAGE) for c in ("scale_1", "scale_0", "shuffled")},
        "text_attribute": {c: mean(c, ASKED_OF_TEXT) for c in ("scale_1", "scale_0")},
        "seconds": seconds,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the time of a `with` block."""
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 1)


def demo(config: DemoConfig) -> str:
    """Run the main job, write `scores.json` and `grid.png`, and return the table of scores and the grid's path."""
    from PIL import Image

    from ip_adapter_trainer.loading.adapter import load_model
    from ip_adapter_trainer.pocket import write

    folder, spent_s = Path(config.output_dir), dict[str, float]()
    with _timed(spent_s, "write"):
        write.write_pocket(folder, rows=config.rows, seed=config.seed)
    with _timed(spent_s, "train"):
        _train(config, folder)
    with _timed(spent_s, "export"):
        adapter = _export(folder)
    with _timed(spent_s, "generate"):
        model = load_model(adapter, str(folder / "base"), str(folder / "image_encoder"))
        pairs = held_out_pairs(config.pairs, config.seed)
        references = [Image.fromarray(world.render(p.reference)) for p in pairs]
        shuffled = references[1:] + references[:1]
        images = {
            "scale_1": _draw(model, pairs, references, config, 1.0),
            "scale_0": _draw(model, pairs, references, config, 0.0),
            "shuffled": _draw(model, pairs, shuffled, config, 1.0),
        }
        image = _grid(model, pairs, references, config, folder)
    scores = {name: score(drawn, pairs) for name, drawn in images.items()}
    seconds = spent_s | {"total": round(sum(spent_s.values()), 1)}
    (folder / "scores.json").write_text(json.dumps(summary(scores, seconds), indent=1) + "\n", encoding="utf-8")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"{table(scores)}\n\n{spent}\nscores: {folder / 'scores.json'}\npicture: {image}"
