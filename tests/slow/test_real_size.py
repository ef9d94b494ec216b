"""Real pictures through the real sizes: SD1.5 and ViT-H/14 with random weights, 256 px, on a CPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, UnidentifiedImageError

from tests.slow import real_size

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    real_size.write_base(made / "base")
    real_size.write_encoder(made / "image_encoder")
    return made


def images() -> Path:
    """Photographs and drawings that ship with scikit-image: colour, gray, alpha, many sizes."""
    skimage = pytest.importorskip("skimage")
    return Path(skimage.__file__).parent / "data"


def mode_of(file: Path) -> str:
    """Pillow's mode, or "unreadable": the run meets such files too and replaces them."""
    try:
        return Image.open(file).mode
    except UnidentifiedImageError:
        return "unreadable"


def test_real_pictures_train_at_real_sizes(folder: Path) -> None:
    root = images()
    names = sorted(p.name for p in root.iterdir() if p.suffix in (".png", ".jpg", ".tif", ".jpeg", ".gif"))
    modes = {mode_of(root / name) for name in names}
    assert len(names) >= 6 and len(modes) >= 2
    (folder / "data.json").write_text(json.dumps([{"image_file": n, "text": Path(n).stem} for n in names]))
    output = folder / "out"
    flags = {
        "pretrained_model_name_or_path": folder / "base", "image_encoder_path": folder / "image_encoder",
        "data_json_file": folder / "data.json", "data_root_path": root, "output_dir": output, "resolution": 256,
        "train_batch_size": 1, "max_train_steps": STEPS, "num_validation_images": 0, "grid_rows": 0,
        "report_to": "none", "logging_steps": 1, "max_fault_rate": 0.5,
    }  # fmt: skip
    command = [sys.executable, "-m", "ip_adapter_trainer", "train", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    state = torch.load(output / f"checkpoint-{STEPS}" / "pytorch_model.bin", weights_only=True)
    size_mb = (output / f"checkpoint-{STEPS}" / "pytorch_model.bin").stat().st_size / 1e6
    print(done.stderr)
    print(f"pictures {len(names)} of modes {sorted(modes)}; peak {peak_gb:.2f} GB; weights {size_mb:.1f} MB")
    assert sum(v.numel() for v in state.values()) == 22_319_616
    assert {f"adapter_modules.{n}.to_k_ip.weight" for n in range(1, 32, 2)} <= state.keys()
    assert peak_gb < 9
    assert size_mb < 95
