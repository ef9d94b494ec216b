"""The interface of a family, and the registry of all of them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import Geometry, Site, TextCondition
from ip_adapter_trainer.nn.packed import Storage

PartName = Literal["autoencoder", "denoiser", "text"]
PARTS: tuple[PartName, ...] = ("autoencoder", "denoiser", "text")


class Family(ABC):
    """One frozen text-to-image base model.

    A subclass lives in a file of its own and registers a name. The training loop sees this interface only.

    Attributes:
        components: names of the pipeline's components that each part needs.
        classes: the classes that each component may be of, the first being that which it is loaded as.
        pipeline: the loaded diffusers pipeline, which also samples.
        denoiser: the frozen network that the adapter is attached to.
        context_dim: width of the tokens its cross-attention reads.
        layer_groups: names for sets of sites, each by the beginnings of its layers' names.
    """

    Config: ClassVar[type[Part]]
    components: ClassVar[Mapping[PartName, tuple[str, ...]]]
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    pipeline: Any
    denoiser: Any
    context_dim: int
    layer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    clip_skip: int | None = None  # the text encoder's layer that is read, from its end; None: the last
    _text_rests = False
    name: str

    @classmethod
    @abstractmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """Return whether a pipeline with this `model_index.json` belongs to the family."""

    @classmethod
    @abstractmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """Demand parts that can be trained on and that fit together, before any weights are read.

        Args:
            settings: of each part that is to be loaded, by its name: the content of its config.json.
            clip_skip: the text encoder's layer that is asked for, counted from its end.
            where: the base model, for messages.

        Raises:
            Problem: they cannot be, or do not.
        """

    @classmethod
    def kind_of(cls, component: str) -> Any:
        """Return the class that a component of the pipeline is loaded as."""
        name = cls.classes[component][0]
        return getattr(importlib.import_module("transformers" if name.startswith("CLIP") else "diffusers"), name)

    @classmethod
    @abstractmethod
    def assemble(cls, loaded: Mapping[str, Any], model_index: Mapping[str, Any], config: Part) -> Family:
        """Return the family of loaded parts.

        Args:
            loaded: the pipeline's components by name.
            model_index: the base model's own, for what it says of the pipeline.
            config: the family's own settings.
        """

    @abstractmethod
    def settle(self, device: torch.device | str, storage: Storage, packed_on: torch.device | str) -> None:
        """Pack the denoiser's weights and move all parts to a device.

        Args:
            device: where the parts are kept.
            storage: how the denoiser keeps its weights.
            packed_on: the device that packs them, one after another.

        Raises:
            Problem: the storage's library is not installed.
        """

    @abstractmethod
    def sites(self) -> list[Site]:
        """The cross-attention layers, in the order and numbering of the adapter file contract."""

    def chosen_sites(self, names: Sequence[str]) -> list[Site]:
        """The sites that names stand for: `all`, one of `layer_groups`, or the beginning of layers' names.

        Raises:
            Problem: a name that stands for no site of this model.
        """
        sites, chosen = self.sites(), set[str]()
        for name in names:
            beginnings = ("",) if name == "all" else self.layer_groups.get(name, (name,))
            found = {site.name for site in sites if f"{site.name}.".startswith(tuple(_whole(b) for b in beginnings))}
            if not found:
                known = {"all", *self.layer_groups, *(site.name.split(".")[0] for site in sites)}
                what = f"{name!r} is no layer of this base model"
                raise Problem(what, where="--adapter_layers", remedy=did_you_mean(name, known))
            chosen |= found
        return [site for site in sites if site.name in chosen]

    @abstractmethod
    def site_weights(self, site: Site) -> tuple[Tensor, Tensor]:
        """The frozen text `to_k` and `to_v` weights of a site, each [width, context_dim]: the pair's initial values."""

    @abstractmethod
    def install(self, processors: Mapping[str, Any]) -> dict[str, Any]:
        """Puts processors, by site name, in place of the denoiser's own; returns the ones they replaced."""

    @abstractmethod
    def processors(self) -> dict[str, Any]:
        """The processors now in place, by site name."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def encode_text(self, texts: Sequence[str], geometry: Sequence[Geometry]) -> TextCondition:
        """Text condition of B prompts; the empty prompt is encoded as the pipeline encodes its unconditional."""
        return self.condition(self.encode_captions(texts), geometry)

    @abstractmethod
    def embedded_prompts(self, prompts: Sequence[str], negative: str, *, guided: bool) -> dict[str, Any]:
        """What the pipeline makes of prompts, as the arguments by which it takes them; `guided` with their negatives.

        Text encoders that rest on the host are on the denoiser's device meanwhile.
        """

    @abstractmethod
    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What depends on B prompts alone: `context` [B, L, D] and the family's own, [B, ...] each."""

    def condition(self, captions: Mapping[str, Tensor], geometry: Sequence[Geometry]) -> TextCondition:
        """The text condition of what `encode_captions` gave, now or when a set was prepared."""
        own = {name: tensor for name, tensor in captions.items() if name != "context"}
        return TextCondition(captions["context"], own)

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[Any]:
        """The modules that `encode_captions` runs, each with a `config`."""

    @property
    @abstractmethod
    def tokenizers(self) -> Sequence[Any]:
        """The tokenizers by which `encode_captions` takes captions apart."""

    def rest_text_encoders(self) -> None:
        """Moves the text encoders to the host, where all captions were encoded before; prompts call them back."""
        self._text_rests = True
        self._move_text_encoders("cpu")

    @contextmanager
    def reading_prompts(self) -> Iterator[None]:
        """Text encoders on the denoiser's device for a while, wherever they rest."""
        if not self._text_rests:
            yield
            return
        self._move_text_encoders(self.device)
        try:
            yield
        finally:
            self._move_text_encoders("cpu")

    def _move_text_encoders(self, device: torch.device | str) -> None:
        for encoder in self.text_encoders:
            encoder.to(device)

    @property
    @abstractmethod
    def text_rules(self) -> str:
        """What else `encode_captions` depends on, but for the text: the tokenizers' words, the family's own rules."""

    @property
    @abstractmethod
    def autoencoder(self) -> Any:
        """The module that `encode_moments` runs, with a `config`: what latents depend on, but for the pixels."""

    @abstractmethod
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance [B, 2C, h, w] of the latents' posterior of pixels [B, 3, H, W], unscaled."""

    def place_encoders(self, device: torch.device | str) -> None:
        """Moves what encodes pictures and captions to a device."""
        self.autoencoder.to(device)
        self._move_text_encoders(device)

    @abstractmethod
    def release_encoder(self) -> None:
        """Lets go of the weights that `encode_moments` alone needs, where all moments are there already."""

    @abstractmethod
    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Scaled fp32 latents [B, C, h, w], drawn from a posterior's moments [B, 2C, h, w] with given normal noise."""

    @abstractmethod
    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of a picture."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The denoiser's output [B, C, h, w] for noisy latents and timesteps [B]."""


FAMILIES: Registry[Family] = Registry("families", "ip_adapter_trainer.families")


def _whole(beginning: str) -> str:
    """Ends a name at a dot, so that `up_blocks.1` does not stand for `up_blocks.10`."""
    return f"{beginning}." if beginning and not beginning.endswith(".") else beginning
