"""The adapter card of a live model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ip_adapter_trainer.adapter_files import AdapterCard
from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.model import Model


def package_version() -> str:
    """Return the installed version of this package; "unknown" if it is not installed."""
    try:
        return version("ip_adapter_trainer")
    except PackageNotFoundError:
        return "unknown"


def card_of(
    model: Model, *, base: str, step: int | None, images_seen: int | None, loaded_with: Mapping[str, Any]
) -> AdapterCard:
    """Return the description of a model's adapter; see `loading.config.loaded_with`."""
    need = model.variant.needs[0]
    encoder, rules = model.encoder, {need.name: model.layout.null(need) for need in model.variant.needs}
    is_published = model.layout.name == "unet" and encoder.kind == "clip"
    return AdapterCard(
        variant=VARIANTS.name_of(model.variant),
        variant_config=model.architecture.config.model_dump(mode="json"),
        family=model.base.family,
        num_tokens=model.num_tokens,
        pretrained_model_name_or_path=base,
        image_encoder_path=encoder.name,
        feature=need.feature,
        feature_dim=model.encoders[need.role].features[need.feature][-1],
        context_dim=model.layout.token_dim(model.denoiser),
        step=step,
        images_seen=images_seen,
        package_version=package_version(),
        loaded_with=dict(loaded_with),
        layout=model.layout.name,
        layout_config=model.architecture.layout_config.model_dump(mode="json"),
        image_encoder=encoder.kind,
        preprocessing=encoder.preprocessing,
        no_image={} if is_published else rules,
    )
