"""An installed package adds an encoder, a variant with its layout, a layout of tokens in the text, and a family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5TokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

EXAMPLES = Path(__file__).parents[2] / "examples" / "extend"
GROUPS = {"encoder": "encoders", "variant": "variants", "layout": "layouts", "family": "families"}
LINES = 80
END = "--- end of a command ---\n"
IN_TURN = f"""
import json, sys
from ip_adapter_trainer.cli import RUN, guarded
for command, *argv in json.loads(sys.argv[1]):
    if code := guarded(RUN[command], argv):
        sys.exit(code)
    print({END!r}, end="")
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which the examples are a package with entry points."""
    folder = tmp_path_factory.mktemp("site")
    told: dict[str, list[str]] = {}
    for file in sorted(EXAMPLES.glob("*.py")):
        assert len(file.read_text().splitlines()) <= LINES, file
        (folder / file.name).write_text(file.read_text())
        told.setdefault(GROUPS[file.stem.split("_")[1]], []).append(f"{file.stem} = {file.stem}")
    info = folder / "extending-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extending\nVersion: 1.0\n")
    text = "".join(f"[ip_adapter_trainer.{group}]\n" + "\n".join(lines) + "\n" for group, lines in told.items())
    (info / "entry_points.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    torch.manual_seed(6)
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=letters, extra_ids=0, model_max_length=16)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        cross_attention_dim=16, patch_size=2, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    text = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
    PixArtSigmaPipeline(tokenizer, text, vae, net, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def ip_adapter(installed: Path) -> Callable[..., list[str]]:
    """Runs commands in a process that has the package installed, and gives what each printed."""

    def run(*commands: list[str]) -> list[str]:
        paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(END)

    return run


@pytest.mark.parametrize(
    ("base", "encoder", "more"),
    [
        ("sd1", "vit", ("--variant=timed",)),
        ("sd1", "clip", ("--variant=base", "--layout=prefix")),
        ("pixart", "clip", ("--variant=plus",)),
        pytest.param("sdxl", "clip", ("--variant=base", "--layout=prefix"), marks=pytest.mark.slow),
        pytest.param("pixart", "vit", ("--variant=base", "--layout=prefix"), marks=pytest.mark.slow),
    ],
)
def test_what_is_added_trains_exports_reloads_and_draws(
    base: str,
    encoder: str,
    more: tuple[str, ...],
    request: pytest.FixtureRequest,
    flags: Callable,
    base_folder: Callable,
    vit: Path,
    encoder_folder: Path,
    ip_adapter: Callable,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue("pixart") if base == "pixart" else base_folder(base)
    models = {
        "pretrained_model_name_or_path": folder,
        "image_encoder_path": vit if encoder == "vit" else encoder_folder,
    }
    file, prompt = str(tmp_path / "adapter.safetensors"), tmp_path / "prompt.png"
    Image.effect_noise((40, 40), 90).convert("RGB").save(prompt)
    drawn = [tmp_path / f"{scale}.png" for scale in (0, 1)]
    draw = [
        "generate", f"--adapter={file}", f"--image={prompt}", "--num_inference_steps=2", "--height=32", "--width=32",
        "--mixed_precision=no",
    ]  # fmt: skip
    _, exported, inspected, *_ = ip_adapter(
        ["train", *flags(tmp_path / "run", **models), *more],
        ["export", str(tmp_path / "run"), "--output", file],
        ["inspect", file],
        *([*draw, f"--scale={scale}", f"--output={out}"] for scale, out in enumerate(drawn)),
    )
    assert "reloaded by" in exported
    assert float(exported.split("differs from the live adapter by ")[1].split(" ")[0]) <= 1e-5
    assert more[0].split("=")[1] in inspected
    assert drawn[0].read_bytes() != drawn[1].read_bytes()
