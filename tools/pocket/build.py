"""Build every weight of the pocket base: `python -m tools.pocket.build --work DIR`, from the top of the repository.

Stages: `autoencoder` and `clip`, then `vision` and `denoiser`, then `pack`; the two of a pair may run side by side.
Each is seeded, goes on from its last save when started again, and must pass its gate (`gates.py`) before what builds
on it begins. `pack` writes the weights into the package and `weights/build.json` with steps, times and the oracle's
scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.pocket import models, write
from tools.pocket import gates, train

MAX_CYCLES = 4
STAGES = ("autoencoder", "clip", "vision", "denoiser", "pack")


def log(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def finished(name: str, net: Any, folder: Path) -> Any:
    """Return a stage's final network, from `folder`.

    Raises:
        Problem: the stage has not been trained to its end and passed its gate.
    """
    file = folder / f"{name}.final"
    if not file.exists():
        raise Problem(f"stage {name} has not passed its gate", where=str(file), remedy=f"run --stage {name} first")
    net.load_state_dict(torch.load(file, weights_only=True))
    return net.eval()


def train_to_gate(stage: train.Stage, folder: Path, look: Callable[[], dict[str, float]], gate: float | None) -> None:
    """Train a stage cycle by cycle until the oracle lets it through; keep its weights and scores.

    Raises:
        Problem: the gate is not passed after the last cycle allowed.
    """
    for cycles in range(1, MAX_CYCLES + 1):
        train.run(stage, folder, cycles, log)
        stage.net.eval()
        scores = look()
        log(f"{stage.name} after {train.total_steps(stage, cycles)} steps: {scores}")
        if gate is None or min(scores.values()) >= gate:
            break
        stage.net.train()
    else:
        gates.demand(stage.name, scores, gate or 0.0)
    spent_s = torch.load(folder / f"{stage.name}.state", weights_only=True)["spent_s"]
    torch.save(stage.net.state_dict(), folder / f"{stage.name}.final")
    record = {"steps": train.total_steps(stage, cycles), "seconds": round(spent_s), "scores": scores}
    (folder / f"{stage.name}.json").write_text(json.dumps(record, indent=1))


def build_autoencoder(seed: int, folder: Path) -> None:
    """Train the autoencoder through its gate."""
    stage = train.autoencoder_stage(seed, train.make_pool(seed))
    train_to_gate(stage, folder, lambda: gates.reconstruction(stage.net, seed), gates.AUTOENCODER_GATE)


def build_clip(seed: int, folder: Path) -> None:
    """Train both towers; the text tower is final after this, the image tower is gated after `vision`."""
    stage = train.clip_stage(seed, train.make_pool(seed))
    train_to_gate(stage, folder, lambda: gates.probe(stage.net, seed), None)


def build_vision(seed: int, folder: Path) -> None:
    """Train the image tower on, through its gate."""
    stage = train.vision_stage(seed, finished("clip", models.clip(), folder).train())
    train_to_gate(stage, folder, lambda: gates.probe(stage.net, seed), gates.ENCODER_GATE)


def build_denoiser(seed: int, folder: Path) -> None:
    """Train the denoiser through its gate, on the finished autoencoder and text tower."""
    vae, clip = finished("autoencoder", models.autoencoder(), folder), finished("clip", models.clip(), folder)
    pool = train.make_pool(seed, train.DENOISER_SPREAD)
    train.fix_scaling_factor(vae, pool)
    stage = train.denoiser_stage(seed, pool, vae, clip)
    base = write.assemble(vae, stage.net, clip)
    train_to_gate(stage, folder, lambda: gates.base_draws_text(base, seed), gates.BASE_GATE)


def save_weights(vae: Any, unet: Any, clip: CLIPModel) -> None:
    """Write the package's weights: autoencoder and denoiser in fp16, CLIP in fp32.

    diffusers reads any file as fp32 unless told otherwise; transformers would keep fp16 and users' CPUs would crawl.
    """
    folder = models.weights_dir()
    for name, net in (("vae", vae), ("unet", unet)):
        net.half().save_pretrained(folder / name)
        net.float()
    clip.save_pretrained(folder / "clip")


def pack(seed: int, folder: Path) -> None:
    """Write the package's weights (autoencoder and denoiser in fp16), read them back and gate them."""
    vae, clip = finished("autoencoder", models.autoencoder(), folder), finished("vision", models.clip(), folder)
    train.fix_scaling_factor(vae, train.make_pool(seed, train.DENOISER_SPREAD))
    unet = finished("denoiser", models.unet(), folder)
    save_weights(vae, unet, clip)
    scores = gates.base_draws_text(write.pipeline(), seed)
    gates.demand("packed base", scores, gates.BASE_GATE)
    record = {name: json.loads((folder / f"{name}.json").read_text()) for name in STAGES[:-1]}
    record |= {"packed": {"scores": scores}, "seed": seed, "torch": torch.__version__}
    (models.weights_dir() / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    log(f"packed: {scores}")


def main(argv: list[str] | None = None) -> int:
    """Run one stage or all of them in order; return 0 when every gate is passed, 2 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for saves; start again to go on")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    run: dict[str, Callable[[int, Path], None]] = {
        "autoencoder": build_autoencoder, "clip": build_clip, "vision": build_vision, "denoiser": build_denoiser,
        "pack": pack,
    }  # fmt: skip
    try:
        for stage in STAGES if options.stage == "all" else (options.stage,):
            run[stage](options.seed, options.work)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
