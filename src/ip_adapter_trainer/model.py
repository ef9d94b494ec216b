"""The one place where a base model, image encoders, a variant and a layout meet: attach, project, predict, detach."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ip_adapter_trainer.adapters import IMAGE, Variant
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Batch, Encoded, Geometry, ImageTokens, Inputs, Need, to_device
from ip_adapter_trainer.encoders import ImageEncoder
from ip_adapter_trainer.families import BaseModel
from ip_adapter_trainer.layouts import Layout, Tables, choose_layers
from ip_adapter_trainer.nn.attention import ImagePrompt

Features = Mapping[Need, Tensor]  # [B, E] or [B, T, E] each
Text = dict[str, Tensor]  # a text condition: `context` [B, L, D] and the base model's own


class Adapter(nn.Module):
    """Everything that is trained. Its state-dict keys are the published training checkpoint's.

    `image_proj_model.*` is the projector, `adapter_modules.N.*` the layers. The master weights are fp32.
    """

    def __init__(self, projector: nn.Module, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.image_proj_model = projector
        self.adapter_modules = nn.ModuleDict({str(number): module for number, module in layers.items()})

    def published(self) -> dict[str, dict[str, Tensor]]:
        """Return the two tables of a published adapter file, with tensors [...] by name."""
        return {"image_proj": self.image_proj_model.state_dict(), "ip_adapter": self.adapter_modules.state_dict()}

    def load_published(self, tables: Tables, where: str) -> None:
        """Load a published file's tables; every key and shape is checked before any weight is changed.

        Raises:
            Problem: tensors are missing, unexpected or of another shape; the first are named.
        """
        targets = {"image_proj": self.image_proj_model, "ip_adapter": self.adapter_modules}
        faults = [f for name, target in targets.items() for f in _differences(name, target.state_dict(), tables[name])]
        if faults:
            named = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            remedy = "check --variant, --num_tokens, the base model and the image encoder against `ip-adapter inspect`"
            raise Problem(f"the adapter file does not fit this model: {named}", where=where, remedy=remedy)
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


@dataclass(frozen=True)
class Architecture:
    """The description of an adapter: everything but its weights."""

    variant: type[Variant]  # turns image features into tokens
    config: Part  # the variant's settings
    layout: Layout  # the adapter's place in the denoiser
    layout_config: Part = field(default_factory=Part)  # the layout's settings
    layers: Sequence[str] = ("all",)  # names of the layers that carry it; see `choose_layers`


class Model:
    """A frozen base model, frozen image encoders and an adapter between them.

    Usage::

        model = Model(base, {"image": encoder}, Architecture(VARIANTS["plus"], config, layout))
        with model.attached():
            features = model.features(prompts, drop)
            prediction = model.predict(noisy, time, text, geometry, model.project(features))
    """

    def __init__(self, base: BaseModel, encoders: Mapping[str, ImageEncoder], architecture: Architecture) -> None:
        self.base, self.codec, self.denoiser = base, base.codec, base.denoiser
        self.encoders, self.architecture = encoders, architecture
        self.variant, self.layout = architecture.variant, architecture.layout
        token_dim = self.layout.token_dim(self.denoiser)
        shapes = {need: encoders[need.role].features[need.feature] for need in self.variant.needs}
        projector = self.variant.projector(architecture.config, shapes, token_dim)
        self.layers = self.layout.layers(self.denoiser)
        self.adapted = choose_layers(self.layers, architecture.layers, self.denoiser.layer_groups)
        make, own = self.layout.module, architecture.layout_config
        modules = {layer.number: make(layer, token_dim, own) for layer in self.layers}
        self.adapter = Adapter(projector, modules)
        for layer in self.layers:
            modules[layer.number].start_from(self.denoiser.net.get_submodule(layer.name))
        self.silence_others()
        self.prompt = ImagePrompt()
        self._originals: dict[str, Any] | None = None
        self._hook: Any = None

    @property
    def encoder(self) -> ImageEncoder:
        """The encoder of the image prompt itself."""
        return self.encoders[IMAGE]

    def silence_others(self) -> None:
        """Make layers that carry no adapter compute as the base model does; loaders demand that files hold them."""
        adapted = {str(layer.number) for layer in self.adapted}
        for number, module in self.adapter.adapter_modules.items():
            if number not in adapted:
                module.requires_grad_(False).silence()  # type: ignore[operator]

    @property
    def num_tokens(self) -> int:
        """Number of image tokens of one image."""
        with torch.no_grad():
            return self.project(self.null(1), torch.zeros(1, device=self.denoiser.device)).tokens.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the frozen denoiser."""
        return self.denoiser.dtype

    @property
    def is_attached(self) -> bool:
        """True while the adapter is in the denoiser's layers."""
        return self._originals is not None

    def attach(self) -> None:
        """Put the adapter into the denoiser's attention layers."""
        assert self._originals is None, "attached twice"
        own, modules = self.denoiser.processors([layer.name for layer in self.adapted]), self.adapter.adapter_modules
        made = [self.layout.processor(a, modules[str(a.number)], self.prompt, own[a.name]) for a in self.adapted]
        self.denoiser.install(dict(zip(own, made, strict=True)))
        self._originals = own
        if self.variant.reads_time:
            self._hook = self.denoiser.net.register_forward_pre_hook(self._project_now, with_kwargs=True)

    def detach(self) -> None:
        """Put the denoiser's own processors back; the base model is what it was."""
        assert self._originals is not None, "not attached"
        self.denoiser.install(self._originals)
        self._originals = None
        self.prompt.clear()
        if self._hook:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def attached(self) -> Iterator[Model]:
        """Attach for the length of a `with` block."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def checkpoint_activations(self) -> None:
        """Make the denoiser recompute activations in the backward pass: less memory, for a second forward pass.

        diffusers does so in training mode only; the frozen nets here have no dropout, so the mode changes nothing else.
        """
        self.denoiser.net.enable_gradient_checkpointing()
        self.denoiser.net.train()

    def place_encoders(self, device: torch.device | str) -> None:
        """Move the encoders of images and captions to a device, ahead of the rest."""
        for encoder in self.encoders.values():
            encoder.model.to(device)
        self.codec.place(device)

    def place(self, device: torch.device | str) -> None:
        """Move the denoiser and the adapter to a device."""
        self.denoiser.net.to(device)
        self.adapter.to(device)

    def release_encoders(self, texts: bool) -> None:
        """Release the weights that only turn images into features and moments, where all images were encoded before.

        With `texts`, captions were encoded too: text encoders stay on the host, and return only for prompts of grids.
        """
        self.null(1)
        for encoder in self.encoders.values():
            encoder.release()
        self.codec.release_encoder()
        if texts:
            self.codec.rest_text_encoders()

    @torch.no_grad()
    def features(self, prompts: Mapping[str, Tensor], drop: Tensor | None = None) -> dict[Need, Tensor]:
        """Return features [B, ...] of prompts [B, 3, S, S] by role; those of "no image" where `drop` [B] is true."""
        found: dict[Need, Tensor] = {}
        for role, pixels in prompts.items():
            wanted = {need.feature: need for need in self.variant.needs if need.role == role}
            encoded = self.encoders[role].encode(pixels, tuple(wanted))
            found |= {wanted[name]: feature for name, feature in encoded.items()}
        return self._dropped(found, drop)

    def features_of(self, inputs: Inputs, drop: Tensor | None = None) -> dict[Need, Tensor]:
        """Return the same features [B, ...] of a batch's images, which may have been encoded before."""
        if isinstance(inputs, Encoded):
            return self._dropped({need: inputs.features[need] for need in self.variant.needs}, drop)
        return self.features(inputs.prompts, drop)

    def null(self, count: int) -> dict[Need, Tensor]:
        """Return the features [B, ...] of "no image", as the layout's readers feed them, for a number of samples."""
        rules = {need: self.layout.null(need) for need in self.variant.needs}
        nulls = {need: self.encoders[need.role].null(need.feature, rule) for need, rule in rules.items()}
        return {need: null.expand(count, *null.shape[1:]) for need, null in nulls.items()}

    def _dropped(self, features: dict[Need, Tensor], drop: Tensor | None) -> dict[Need, Tensor]:
        if drop is None or not bool(drop.any()):
            return features
        nulls, kept = self.null(1), {}
        for need, feature in features.items():
            mask = to_device(drop, feature.device).view(-1, *[1] * (feature.ndim - 1))
            kept[need] = torch.where(mask, nulls[need].to(feature.dtype), feature)
        return kept

    def moments_of(self, inputs: Inputs) -> Tensor:
        """Return moments [B, 2C, h, w] of a batch's targets, which may have been encoded before.

        They are contiguous in both cases: kernels are chosen by memory format, and another one rounds differently.
        """
        moments = inputs.moments if isinstance(inputs, Encoded) else self.codec.moments(inputs.pixels)
        return moments.contiguous()

    def text_of(self, batch: Batch) -> Text:
        """Return the text condition [B, ...] of a batch's captions, which may have been encoded before."""
        inputs = batch.inputs
        if isinstance(inputs, Encoded) and inputs.text:
            return {name: tensor.to(self.denoiser.device) for name, tensor in inputs.text.items()}
        return self.codec.text(batch.text)

    def project(
        self, features: Features, time: Tensor | None = None, dropped: Mapping[str, Tensor] | None = None
    ) -> ImageTokens:
        """Return tokens [B, N, D] of features [B, ...], in the compute dtype; only the projector runs under autocast.

        The time [B] is used only by variants whose tokens depend on it; `dropped`, see `Variant.tokens`.
        """
        projector, time = self.adapter.image_proj_model, time if self.variant.reads_time else None
        if self.dtype == torch.float32:
            features = {need: feature.float() for need, feature in features.items()}
            return self.variant.tokens(projector, features, time, dropped)
        with torch.autocast(self.denoiser.device.type, dtype=self.dtype):
            found = self.variant.tokens(projector, features, time, dropped)
        embedding = None if found.time_embedding is None else found.time_embedding.to(self.dtype)
        return ImageTokens(found.tokens.to(self.dtype), embedding)

    def show(self, image: ImageTokens | None, scale: float = 1.0) -> None:
        """Set the tokens that the adapted layers attend to from now on; None: the base model runs."""
        self.prompt.tokens, self.prompt.time_embedding = (image.tokens, image.time_embedding) if image else (None, None)
        self.prompt.scale, self.prompt.features = scale, None

    def show_features(self, features: Features, scale: float = 1.0) -> None:
        """Set features [B, ...] from which each of a sampler's forward passes makes tokens for its own time."""
        self.prompt.scale, self.prompt.features = scale, features

    def _project_now(self, net: nn.Module, args: Any, kwargs: Any) -> None:
        """Make the tokens for the time of a forward pass of the denoiser, just before it."""
        features = self.prompt.features
        if features is not None:
            time = inspect.signature(net.forward).bind(*args, **kwargs).arguments["timestep"]
            count = next(iter(features.values())).shape[0]
            image = self.project(features, torch.as_tensor(time, device=self.denoiser.device).expand(count))
            self.prompt.tokens, self.prompt.time_embedding = image.tokens, image.time_embedding

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        text: Text,
        geometry: Sequence[Geometry],
        image: ImageTokens | None,
        scale: float = 1.0,
    ) -> Tensor:
        """Return the denoiser's output [B, C, h, w] for noisy latents [B, C, h, w], times [B] and image tokens.

        Without an image, or at scale 0 where the layout has no low-rank deltas, it is the base model's output.
        """
        self.show(image, scale)
        if image is not None and scale:
            text = self.layout.condition(text, image.tokens)
        return self.denoiser.predict(noisy, time, text, geometry)
