"""Settings refuse what cannot work, and say what would."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from ip_adapter_trainer.feed.config import DataConfig
from ip_adapter_trainer.manifest.config import ReadConfig
from ip_adapter_trainer.prepare.check_config import RowsCheckConfig as CheckConfig

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "resolution": ({"resolution": 500}, "take 496 or 504"),
    "resolution under a latent": ({"resolution": 4}, "take 8"),
    "bucket step": ({"bucket_step_px": 12}, "take 8 or 16"),
    "bucket step of another resolution": ({"aspect_ratio_buckets": True, "resolution": 520}, "a step that divides it"),
    "rates": ({"text_drop_rate": 0.5, "image_drop_rate": 0.4, "both_drop_rate": 0.2}, "sum to 1.1"),
    "colour": ({"alpha_background": "pink"}, "'#rrggbb'"),
    "more than memory takes": ({"max_image_megapixels": 501}, "500"),
    "unknown key": ({"resolutoin": 512}, "resolutoin"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    settings, words = REFUSED[name]
    with pytest.raises(ValidationError, match=words):
        DataConfig(data_json_file="data.json", **settings)


def test_the_manifest_must_be_named() -> None:
    with pytest.raises(ValidationError, match="data_json_file"):
        DataConfig()  # type: ignore[call-arg]


def test_published_defaults() -> None:
    config = DataConfig(data_json_file="data.json")
    rates = (config.text_drop_rate, config.image_drop_rate, config.both_drop_rate)
    assert (config.resolution, config.micro_images, rates) == (512, 8, (0.05, 0.05, 0.05))
    assert config.buckets().sizes_px == ((512, 512),)
    assert DataConfig(data_json_file="d", text_drop_rate=1.0, image_drop_rate=0, both_drop_rate=0).text_drop_rate == 1


def test_check_and_training_read_alike() -> None:
    for name, field in ReadConfig.model_fields.items():
        assert DataConfig.model_fields[name].default == CheckConfig.model_fields[name].default == field.default
    assert all(field.description for kind in (DataConfig, CheckConfig) for field in kind.model_fields.values())


def test_settings_load_nothing_heavy() -> None:
    code = (
        "import sys, ip_adapter_trainer.feed.config; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
