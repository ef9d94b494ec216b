"""The one place where a family meets a variant: build, attach, project, predict, detach; the adapter's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ip_adapter_trainer.adapters import Variant
from ip_adapter_trainer.core.devices import to_device
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Batch, Encoded, Inputs, Site, TextCondition
from ip_adapter_trainer.encoders import ClipImageEncoder
from ip_adapter_trainer.families import Family
from ip_adapter_trainer.nn.attention import DecoupledProcessor, ImageKV, ImagePrompt


class Adapter(nn.Module):
    """Everything that is trained. Its state-dict keys are the published training checkpoint's.

    `image_proj_model.*` is the projector, `adapter_modules.N.to_{k,v}_ip.weight` the pairs. Weights are fp32 masters.
    """

    def __init__(self, projector: nn.Module, sites: list[Site]) -> None:
        super().__init__()
        self.image_proj_model = projector
        self.adapter_modules = nn.ModuleDict({str(s.number): ImageKV(s.context_dim, s.width) for s in sites})

    def published(self) -> dict[str, dict[str, Tensor]]:
        """The two tables of a published adapter file."""
        return {"image_proj": self.image_proj_model.state_dict(), "ip_adapter": self.adapter_modules.state_dict()}

    def load_published(self, tables: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
        """Loads a published file's tables, every key and shape checked before any weight is changed.

        Raises:
            Problem: missing, unexpected or wrongly shaped tensors, each named.
        """
        targets = {"image_proj": self.image_proj_model, "ip_adapter": self.adapter_modules}
        faults = [f for name, target in targets.items() for f in _differences(name, target.state_dict(), tables[name])]
        if faults:
            shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            remedy = "check --variant, --num_tokens, the base model and the image encoder against `ip-adapter inspect`"
            raise Problem(f"the adapter file does not fit this model: {shown}", where=where, remedy=remedy)
        for name, target in targets.items():
            target.load_state_dict(dict(tables[name]))


def _differences(table: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in theirs:
            yield f"{table}.{key} is missing"
        elif key not in mine:
            yield f"{table}.{key} is not expected"
        elif mine[key].shape != theirs[key].shape:
            yield f"{table}.{key} is {list(theirs[key].shape)}, expected {list(mine[key].shape)}"


class Model:
    """A frozen base model, a frozen image encoder and an adapter between them.

    Usage::

        model = Model(family, encoder, VARIANTS["plus"], config)
        with model.attached():
            features = model.features(pixels, drop)
            prediction = model.predict(noisy, timesteps, text, model.project(features))
    """

    def __init__(
        self,
        family: Family,
        encoder: ClipImageEncoder,
        variant: type[Variant],
        config: Part,
        layers: Sequence[str] = ("all",),
    ) -> None:
        self.family, self.encoder, self.variant, self.config = family, encoder, variant, config
        kind = variant.feature
        projector = variant.projector(
            config,
            context_dim=family.context_dim,
            feature_dim=encoder.width(kind),
            feature_length=encoder.length(kind),
        )
        self.sites = family.sites()
        self.adapter = Adapter(projector, self.sites)
        self.adapted = family.chosen_sites(layers)
        self._copy_frozen_pairs()
        self.silence_others()
        self.prompt = ImagePrompt()
        self._originals: dict[str, object] | None = None

    @torch.no_grad()
    def _copy_frozen_pairs(self) -> None:
        """K' and V' start as the text's own K and V: "to speed up the convergence" (paper, section 3.2.2)."""
        for site in self.sites:
            pair = self.adapter.adapter_modules[str(site.number)]
            assert isinstance(pair, ImageKV)
            key, value = self.family.site_weights(site)
            pair.to_k_ip.weight.copy_(key)
            pair.to_v_ip.weight.copy_(value)

    @torch.no_grad()
    def silence_others(self) -> None:
        """Layers that carry no adapter keep pairs of zeros, which loaders demand and which add exactly nothing."""
        adapted = {str(site.number) for site in self.adapted}
        for number, pair in self.adapter.adapter_modules.items():
            if number not in adapted:
                for weight in pair.requires_grad_(False).parameters():
                    weight.zero_()

    @property
    def num_tokens(self) -> int:
        """Image tokens of one picture."""
        with torch.no_grad():
            return self.project(self.encoder.null(self.variant.feature)).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the frozen denoiser."""
        return next(self.family.denoiser.parameters()).dtype

    @property
    def is_attached(self) -> bool:
        """Whether the adapter is in the denoiser's layers now."""
        return self._originals is not None

    def attach(self) -> None:
        """Puts the adapter into the denoiser's cross-attention layers."""
        assert self._originals is None, "attached twice"
        own = self.family.processors()
        pairs = self.adapter.adapter_modules
        processors = {
            s.name: DecoupledProcessor(pairs[str(s.number)], self.prompt, own[s.name])  # type: ignore[arg-type]
            for s in self.adapted
        }
        self._originals = self.family.install(processors)

    def detach(self) -> None:
        """Puts the denoiser's own processors back; the base model is what it was."""
        assert self._originals is not None, "not attached"
        self.family.install(self._originals)
        self._originals = None
        self.prompt.tokens = None

    @contextmanager
    def attached(self) -> Iterator[Model]:
        """Attaches for the length of a `with` block."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def checkpoint_activations(self) -> None:
        """Lets the denoiser recompute activations in the backward pass: less memory for a second forward.

        diffusers does so in training mode only; the frozen nets here have no dropout, so the mode changes nothing else.
        """
        self.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.family.denoiser.train()

    def place_encoders(self, device: torch.device | str) -> None:
        """Moves what encodes pictures and captions to a device, ahead of the rest."""
        self.encoder.model.to(device)
        self.family.place_encoders(device)

    def place(self, device: torch.device | str) -> None:
        """Moves the denoiser and the adapter to a device."""
        self.family.denoiser.to(device)
        self.adapter.to(device)

    def release_encoders(self, texts: bool) -> None:
        """Lets go of the weights that only turn pictures into features and moments, where all were encoded before.

        With `texts`, where captions were too, the text encoders rest on the host and come back for prompts of grids.
        """
        self.encoder.release(self.variant.feature)
        self.family.release_encoder()
        if texts:
            self.family.rest_text_encoders()

    @torch.no_grad()
    def features(self, prompt_pixels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Image features of [B, 3, S, S]; where `drop` [B] is true, the loaders' own "no picture" feature."""
        return self._dropped(self.encoder.encode(prompt_pixels, self.variant.feature), drop)

    def features_of(self, image: Inputs, drop: Tensor | None = None) -> Tensor:
        """The same of a batch's pictures, which may have been encoded before."""
        if isinstance(image, Encoded):
            return self._dropped(image.features, drop)
        return self.features(image.prompt_pixels, drop)

    def moments_of(self, image: Inputs) -> Tensor:
        """Moments [B, 2C, h, w] of a batch's targets, which may have been encoded before.

        Contiguous either way: kernels choose by memory format, and so round otherwise for the same numbers.
        """
        moments = image.moments if isinstance(image, Encoded) else self.family.encode_moments(image.pixels)
        return moments.contiguous()

    def text_of(self, batch: Batch) -> TextCondition:
        """Text condition of a batch's captions, which may have been encoded before."""
        image = batch.inputs
        if isinstance(image, Encoded) and image.text:
            kept = {name: tensor.to(self.family.device) for name, tensor in image.text.items()}
            return self.family.condition(kept, batch.geometry)
        return self.family.encode_text(batch.text, batch.geometry)

    def _dropped(self, features: Tensor, drop: Tensor | None) -> Tensor:
        if drop is None or not bool(drop.any()):
            return features
        mask = to_device(drop, features.device).view(-1, *[1] * (features.ndim - 1))
        return torch.where(mask, self.encoder.null(self.variant.feature).to(features.dtype), features)

    def project(self, features: Tensor) -> Tensor:
        """Tokens [B, N, context_dim] of features, in the compute dtype; autocast around the small projector alone."""
        if self.dtype == torch.float32:
            return self.adapter.image_proj_model(features.float())
        with torch.autocast(features.device.type, dtype=self.dtype):
            return self.adapter.image_proj_model(features).to(self.dtype)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: TextCondition, tokens: Tensor | None, scale: float = 1.0
    ) -> Tensor:
        """The denoiser's output with image tokens [B, N, context_dim]; None or scale 0 is the base model."""
        self.prompt.tokens, self.prompt.scale = tokens, scale
        return self.family.predict(noisy, timesteps, text)
