"""The interfaces of a family, and the registry of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.settings import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ip_adapter_trainer.core.values import Geometry
    from ip_adapter_trainer.nn.packed import Storage

PartName = Literal["autoencoder", "denoiser", "text"]
PARTS: tuple[PartName, ...] = ("autoencoder", "denoiser", "text")


class Codec(ABC):
    """The part of a base model that encodes images to latents and captions to the text condition."""

    _text_rests = False

    @property
    @abstractmethod
    def autoencoder(self) -> Any:
        """The module that `moments` runs; it has a `config`."""

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[Any]:
        """The modules that `text` runs; each has a `config`."""

    @property
    @abstractmethod
    def tokenizers(self) -> Sequence[Any]:
        """The tokenizers that `text` applies to captions."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that text conditions are needed on: the denoiser's."""

    @property
    @abstractmethod
    def text_rules(self) -> str:
        """Everything that `text` depends on beside captions and encoders: vocabularies, own rules."""

    @abstractmethod
    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image."""

    @abstractmethod
    def moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log variance [B, 2C, h, w] of the latents' posterior for pixels [B, 3, H, W], unscaled."""

    @abstractmethod
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Return fp32 latents [B, C, h, w], scaled and shifted, drawn from moments [B, 2C, h, w] with normal noise."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text condition of B captions: `context` [B, L, D] and the family's own tensors, [B, ...] each.

        The empty caption is encoded as the pipeline encodes its unconditional prompt.
        """

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the same [B, ...] as the pipeline does for positive prompts: an empty one is encoded as any other."""
        return self.encode(captions)

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return `encode` of B captions, [B, ...]; text encoders on the host are moved to the device for it."""
        with self.awake():
            return self.encode(captions)

    @abstractmethod
    def release_encoder(self) -> None:
        """Release the weights that only `moments` needs, once all moments are encoded."""

    def rest_text_encoders(self) -> None:
        """Move the text encoders to the host, once all captions are encoded; `text` moves them back while it runs."""
        self._text_rests = True
        self._move_text_encoders("cpu")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the text encoders on the denoiser's device during a `with` block."""
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

    def place(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.autoencoder.to(device)
        self._move_text_encoders(device)


class Denoiser(ABC):
    """The frozen network that an adapter is attached to.

    Attributes:
        pipeline: the diffusers pipeline, which samples.
        net: the network.
        context_dim: width D of the text that its cross-attention reads.
        layouts: names of the layouts that go with it, the usual one first.
        layer_groups: named groups of layers, each as the beginnings of their names.
    """

    pipeline: Any
    net: Any
    context_dim: int
    layouts: ClassVar[tuple[str, ...]]
    layer_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @abstractmethod
    def predict(self, noisy: Tensor, time: Tensor, text: dict[str, Tensor], geometry: Sequence[Geometry]) -> Tensor:
        """Return the network's output [B, C, h, w] for noisy latents [B, C, h, w] and times [B]."""

    @abstractmethod
    def sampling(self, positive: dict[str, Tensor], negative: dict[str, Tensor] | None) -> dict[str, Any]:
        """Return the pipeline's arguments for text conditions [B, ...]; `negative` is None without guidance."""

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the network's weights."""
        return next(self.net.parameters()).dtype

    def processors(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the current attention processors, by the names of their layers."""
        return {name: self.net.get_submodule(name).processor for name in names}

    def install(self, processors: Mapping[str, Any]) -> None:
        """Replace attention processors, by the names of their layers."""
        for name, processor in processors.items():
            self.net.get_submodule(name).processor = processor


@dataclass
class BaseModel:
    """One frozen text-to-image base model."""

    family: str
    codec: Codec
    denoiser: Denoiser


class Family(ABC):
    """A kind of base model: its parts, which of them fit together, and how they are used.

    A subclass lives in a file of its own and registers a name.

    Attributes:
        Config: the family's own settings.
        components: names of the pipeline's components that each part needs.
        classes: the classes that each component may have; it is loaded as the first.
        spare: by component, the pattern of names in its files that nothing reads.
    """

    Config: ClassVar[type[Part]] = Part
    components: ClassVar[Mapping[PartName, tuple[str, ...]]]
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    spare: ClassVar[Mapping[str, str]] = {}

    @classmethod
    @abstractmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """Return whether a pipeline with this `model_index.json` belongs to the family."""

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """Demand parts that can be trained on and that fit together, before any weights are read.

        `settings` is the config.json of each component that is to be loaded, by its name; `clip_skip` the layer of the
        text encoder that is asked for, counted from its end.

        Raises:
            Problem: they cannot be trained on, or do not fit together.
        """

    @classmethod
    def kind_of(cls, component: str) -> Any:
        """Return the class that a component of the pipeline is loaded as."""
        import diffusers
        import transformers

        name = cls.classes[component][0]
        return getattr(diffusers if hasattr(diffusers, name) else transformers, name)

    @classmethod
    @abstractmethod
    def assemble(
        cls, loaded: Mapping[str, Any], model_index: Mapping[str, Any], config: Part, clip_skip: int | None
    ) -> tuple[Codec, Denoiser]:
        """Return codec and denoiser over the pipeline's loaded components, by the family's own settings; see `demand`.

        What needs a component that was not loaded must not be used.
        """

    @classmethod
    def spared(cls, layer: str) -> bool:
        """Return whether a layer of the denoiser, by its name, keeps its weights unpacked where others are packed."""
        return False

    @classmethod
    def settle(
        cls, base: BaseModel, device: torch.device | str, storage: Storage, packed_on: torch.device | str
    ) -> None:
        """Pack the denoiser's weights, one after another on a device of their own, and move all parts to a device.

        Raises:
            Problem: the storage's library is not installed.
        """
        from ip_adapter_trainer.nn.packed import pack

        if base.denoiser.net is not None:
            pack(base.denoiser.net, storage, packed_on, cls.spared)
        base.denoiser.pipeline.to(device)


FAMILIES: Registry[Family] = Registry("families", "ip_adapter_trainer.families")
