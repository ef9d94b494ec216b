"""The spec of a cache: digests of the frozen encoders' content, and the tables of what they encode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.cache.shards import TableKind
from ip_adapter_trainer.cache.spec import CacheSpec, TextSpec
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.encoders import ImageEncoder
from ip_adapter_trainer.families import Codec
from ip_adapter_trainer.images.background import parse_colour

_SAYS_NOTHING = ("architectures", "dtype", "torch_dtype", "transformers_version")  # nor do names that begin with "_"


def module_digest(module: Any) -> str:
    """Return a hash of a model's config and of its weights, as loaded: it changes when either does."""
    config = dict(module.config.items() if hasattr(module.config, "items") else module.config.to_dict().items())
    told = {k: v for k, v in config.items() if not k.startswith("_") and k not in _SAYS_NOTHING}
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_spec(
    config: CutConfig, codec: Codec, encoders: Mapping[str, ImageEncoder], needs: Sequence[Need], *, text: bool
) -> CacheSpec:
    """Return the spec of what these models make of images cut by these settings and, with `text`, of captions."""
    buckets, autoencoder = config.buckets(), codec.autoencoder
    features = {}
    for need in needs:
        encoder = encoders[need.role]
        features[need] = TableKind(need.name, encoder.features[need.feature], encoder.model.dtype)
    return CacheSpec(
        buckets=buckets,
        background=parse_colour(config.alpha_background),
        pad_square=config.prompt_pad_square,
        mirrors=config.random_flip,
        autoencoder=module_digest(autoencoder),
        encoders={role: encoder_digest(encoders[role]) for role in dict.fromkeys(need.role for need in needs)},
        moments={size_px: _moments_kind(codec, autoencoder, size_px) for size_px in buckets.sizes_px},
        features={
            n: TableKind(n.name, encoders[n.role].features[n.feature], encoders[n.role].model.dtype) for n in needs
        },
        text=_text_spec(codec) if text else None,
    )


def encoder_digest(encoder: ImageEncoder) -> str:
    """Return a hash of an image encoder and of its preprocessing, where its kind alone does not decide that."""
    digest = module_digest(encoder.model)
    return digest + json.dumps(encoder.preprocessing, sort_keys=True, default=str) * bool(encoder.preprocessing)


def _text_spec(codec: Codec) -> TextSpec:
    told = [codec.text_rules, *map(module_digest, codec.text_encoders)]
    encoders = hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()
    made = codec.text([""])
    return TextSpec(encoders, tuple(TableKind(name, tuple(t.shape[1:]), t.dtype) for name, t in made.items()))


def _moments_kind(codec: Codec, autoencoder: nn.Module, size_px: tuple[int, int]) -> TableKind:
    channels, height, width = codec.latent_shape(*size_px)
    return TableKind("moments", (2 * channels, height, width), next(autoencoder.parameters()).dtype)
