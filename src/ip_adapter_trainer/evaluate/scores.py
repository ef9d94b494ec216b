"""`ip-adapter evaluate`: CLIP-I and CLIP-T by the paper's protocol, beside scale 0 and shuffled image prompts.

Every row's picture prompts some pictures, with an empty text unless told otherwise (section 4.1.3 of the paper: four
of each of 5000 rows of COCO val2017). CLIP-I compares them with the prompting picture, CLIP-T with the row's caption.
The same seeds are drawn again at scale 0 and with another row's picture: what an adapter scores there it owes to the
base model, or to any picture at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from ip_adapter_trainer.adapter_files import weights_sha256
from ip_adapter_trainer.core.errors import Problem, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.rng import key
from ip_adapter_trainer.evaluate.clip import ClipScorer, clip_i, clip_t
from ip_adapter_trainer.evaluate.config import EvaluateConfig
from ip_adapter_trainer.evaluate.prompts import Prompt, read_prompts
from ip_adapter_trainer.evaluate.report import CLIP_I, CLIP_T, CONDITIONS, PROMPTED, SCALE_0, SHUFFLED, Evaluation
from ip_adapter_trainer.evaluate.sample import Sampling, image_features, sample
from ip_adapter_trainer.evaluate.shuffle import others
from ip_adapter_trainer.evaluate.start import choose_device, load, sampling
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.runtime.progress import Progress
from ip_adapter_trainer.runtime.stopping import Poll, no_poll

__all__ = ["DrawPlan", "EvaluateConfig", "evaluate", "score"]

Values = dict[str, dict[str, NDArray[np.float64]]]  # condition, metric: [rows]


@dataclass(frozen=True)
class DrawPlan:
    """The images that are drawn for every row in each condition."""

    how: Sampling
    text: str = ""
    pictures: int = 4
    seed: int = 0


def evaluate(config: EvaluateConfig, poll: Poll = no_poll) -> Evaluation:
    """Score an adapter on rows of a manifest and write the JSON file.

    Raises:
        Problem: something cannot be read, loaded or written.
    """
    output = _writable(Path(config.output))
    prompts, faults = read_prompts(config)
    clip = ClipScorer.load(config.clip_model, choose_device(config.device))
    if cuts := clip.cuts([prompt.caption for prompt in prompts]):
        say(cuts)
    model, began = load(config), time.monotonic()
    plan = DrawPlan(sampling(config, model), config.prompt, config.num_images_per_prompt, config.seed)
    values = score(model, clip, prompts, plan, poll)
    protocol = {
        "adapter": Path(config.adapter).name,
        "adapter_sha256": weights_sha256(model.adapter.published()),
        "clip_model": config.clip_model,
        "rows": len(prompts),
        "images": len({prompt.image for prompt in prompts}),
        **asdict(plan),
    }
    found = Evaluation.of(values, protocol, [str(fault) for fault in faults], round(time.monotonic() - began, 1))
    _write(found, output)
    return found


def _writable(output: Path) -> Path:
    """The file, tried now: hours of drawing should not end at a folder that is not there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not output.exists()
        output.open("a").close()
        if is_new:
            output.unlink()
    except OSError as error:
        what = f"cannot write the scores: {error.strerror}"
        raise Problem(what, where=str(output), remedy="choose another file with --output") from error
    return output


def _write(found: Evaluation, output: Path) -> None:
    try:
        output.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        say(str(found))  # what took hours is at least shown
        what = f"cannot write the scores: {error.strerror}"
        raise StorageProblem(what, where=str(output), remedy="they are printed above; make room") from error


def score(model: Model, clip: ClipScorer, prompts: Sequence[Prompt], plan: DrawPlan, poll: Poll = no_poll) -> Values:
    """Return CLIP-I and CLIP-T of every row in every condition; `poll` is called between forward passes.

    CLIP-T is NaN where a row has no caption; both are, for shuffled prompts, where all rows show one image.
    """
    wrong = others([prompt.image for prompt in prompts], plan.seed, "evaluate-shuffle")
    values = {how: {name: np.full(len(prompts), np.nan) for name in (CLIP_I, CLIP_T)} for how in CONDITIONS}
    at_once = max(1, plan.how.batch_images // plan.pictures)
    with Progress(len(prompts), "row") as progress:
        for start in range(0, len(prompts), at_once):
            rows = range(start, min(start + at_once, len(prompts)))
            strangers = [] if wrong is None else [prompts[wrong[row]].read() for row in rows]
            scored = _score_rows(model, clip, prompts[start : rows.stop], strangers, plan, poll)
            for condition, metrics in scored.items():
                for name, scores in metrics.items():
                    values[condition][name][start : rows.stop] = scores
            progress.update(len(rows))
    return values


def _score_rows(
    model: Model, clip: ClipScorer, prompts: Sequence[Prompt], strangers: Sequence[Image], plan: DrawPlan, poll: Poll
) -> Values:
    """The values of a few rows, drawn together."""
    own, captions = [prompt.read() for prompt in prompts], [prompt.caption.strip() for prompt in prompts]
    references, texts = clip.images(own)[:, None], clip.texts(captions)[:, None]  # [R, 1, E]
    seeds = [key(plan.seed, "evaluate", prompt.number, n) % 2**63 for prompt in prompts for n in range(plan.pictures)]
    values: Values = {}
    shuffled = [(SHUFFLED, strangers)] if strangers else []
    for condition, prompting in ((PROMPTED, own), (SCALE_0, own), *shuffled):
        how = replace(plan.how, scale=0.0) if condition == SCALE_0 else plan.how
        features = image_features(model, [[image] for image in prompting])
        images = sample(model, features, [plan.text] * len(seeds), seeds, how, poll)
        drawn = clip.images(images).reshape(len(prompting), plan.pictures, -1)  # [R, n, E]
        by_caption = clip_t(drawn, texts).mean(1).numpy()
        values[condition] = {
            CLIP_I: clip_i(drawn, references).mean(1).numpy(),
            CLIP_T: np.where([bool(caption) for caption in captions], by_caption, np.nan),
        }
    return values
