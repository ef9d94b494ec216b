"""The frozen models of a run, by its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.diffusion.schedulers import NoiseConfig
from ip_adapter_trainer.families import FAMILIES, BaseModel
from ip_adapter_trainer.loading.base import family_of, load_base
from ip_adapter_trainer.loading.config import FrozenConfig, part_of
from ip_adapter_trainer.loading.encoder import load_encoders

if TYPE_CHECKING:
    import torch

    from ip_adapter_trainer.core.settings import Part
    from ip_adapter_trainer.encoders import ImageEncoder
    from ip_adapter_trainer.nn.choices import Storage
    from ip_adapter_trainer.runtime.launch import Runtime


def load_frozen(
    config: FrozenConfig, runtime: Runtime, own: Part, storage: Storage
) -> tuple[BaseModel, dict[str, ImageEncoder]]:
    """Load the base model and the image encoders of a run on the host; parts that stay there take no device memory.

    The runtime says in which precision, and which device packs weights; `own` are the variant's settings.

    Raises:
        Problem: something is missing or of an unknown kind.
    """
    base = load_base_of(config, runtime.dtype, "cpu", storage=storage, packed_on=runtime.device)
    needs = VARIANTS[config.variant].needs
    return base, load_encoders(needs, config.image_encoder_path, own, config, dtype=runtime.dtype)


def load_base_of(config: FrozenConfig, dtype: torch.dtype, device: torch.device | str, **how: Any) -> BaseModel:
    """Load parts of the base model, see `load_base`; the family's own settings are taken from the run's."""
    name = config.pretrained_model_name_or_path
    family = family_of(name, config.family, config)
    own = part_of(config, FAMILIES[family].Config)
    noise = part_of(config, NoiseConfig).overrides()
    return load_base(name, config, family=family, own=own, noise=noise, dtype=dtype, device=device, **how)
