"""The interface of an image encoder, and the registry of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ip_adapter_trainer.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, nn


class ImageEncoder(ABC):
    """A frozen model that turns images into features.

    A subclass lives in a file of its own and registers a name. What it calls `image_embeds` is one vector an image,
    what it calls `penultimate` is what its last layer gets: one vector a patch, special tokens before them.

    Attributes:
        known_as: values of `model_type` in config.json, by which the encoder is chosen.
        model_class: of transformers.
        spare: pattern of names in its files that belong to another model, such as CLIP's half that reads text.
        kind: the name under which the class is registered.
        name: folder or hub id that it came from.
        is_mended: True if its weights have other names there, with which other programs do not find them.
        model: the frozen module.
        preprocessing: what decides the pixels that it is given, for cards and digests; empty: its size alone.
        side_px: side S of its input.
        is_released: True once the weights were let go of.
    """

    known_as: ClassVar[tuple[str, ...]]
    model_class: ClassVar[str]
    spare: ClassVar[str] = ""
    kind: str

    def __init__(self, model: Any, folder: Path, name: str, is_mended: bool = False) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.name, self.is_mended, self.kind = name, is_mended, ENCODERS.name_of(type(self))
        self.preprocessing: dict[str, Any] = {}
        self._preprocess = self.make_preprocess(folder)
        self.side_px: int = self.preprocess(_blank()).shape[-1]
        self._null: dict[tuple[str, str], Tensor] = {}
        self.is_released = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes need to preprocess images: everything but weights."""
        return {**vars(self), "model": None, "_null": {}}

    @property
    def patches(self) -> int:
        """The patches that it cuts one image into."""
        return (self.side_px // int(self.model.config.patch_size)) ** 2

    @abstractmethod
    def make_preprocess(self, folder: Path) -> Any:
        """Return what turns images into pixels: one of transformers' image processors.

        Raises:
            Problem: its settings, if it needs any, do not lie in the model's folder.
        """

    @property
    @abstractmethod
    def features(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every feature of one image: (E) or (T, E)."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Module:
        """The last layer of the model's stack, whose input is `penultimate`."""

    def embeds(self, output: Any) -> Tensor:
        """Return `image_embeds` [B, E] of the model's output: its pooled output, by default."""
        return output.pooler_output

    @classmethod
    def unread(cls, settings: Mapping[str, Any], names: Sequence[str], features: Sequence[str]) -> str | None:
        """Return the pattern of weights that some features do not read, so that they may be missing; None: no such.

        `settings` is the content of config.json, `names` those of the weights in the model's files.
        """
        return None

    def preprocess(self, image: Image) -> Tensor:
        """Turn an RGB image into [3, S, S], as the encoder wants it."""
        import numpy as np
        import torch

        pixels = self._preprocess(images=image, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))

    def encode(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return features by name, [B, E] or [B, T, E] each, of preprocessed pixels [B, 3, S, S]; one pass for all."""
        import torch

        assert not self.is_released, "the encoder's weights are gone"
        dtype, penultimate = self.model.dtype, list[torch.Tensor]()
        listening = self.last_layer.register_forward_pre_hook(lambda _, given: penultimate.append(given[0]))
        with torch.no_grad(), listening:
            output = self.run(pixels.to(self.model.device, dtype), names)
        found = {"penultimate": lambda: penultimate[0], "image_embeds": lambda: self.embeds(output)}
        return {name: found[name]().to(dtype) for name in names}

    def run(self, pixels: Tensor, names: Sequence[str]) -> Any:
        """Return the model's output for pixels [B, 3, S, S], as far as the features of these names need it."""
        return self.model(pixels)

    def null(self, feature: str, rule: str) -> Tensor:
        """Return the feature that stands for "no image", with a batch of one: [1, E] or [1, T, E].

        Args:
            feature: one of `features`.
            rule: `zeros`, of the feature itself; `zero_pixels`, the encoding of zeros after normalisation; or
                `black_image`, that of a black image.
        """
        import torch

        if (feature, rule) not in self._null:
            if rule == "zeros":
                value = torch.zeros(1, *self.features[feature], dtype=self.model.dtype, device=self.model.device)
            else:
                zeros = torch.zeros(3, self.side_px, self.side_px)
                pixels = zeros if rule == "zero_pixels" else self.preprocess(_blank())
                value = self.encode(pixels[None], (feature,))[feature]
            self._null[feature, rule] = value
        return self._null[feature, rule]

    def release(self) -> None:
        """Let go of the weights; what `null` gave before, it still gives."""
        self.model.to("meta")
        self.is_released = True


_SIZES = ((64, 72), (200, 100))  # of images that are tried, width and height


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (64, 72))


ENCODERS: Registry[ImageEncoder] = Registry("encoders", "ip_adapter_trainer.encoders")


def folder_preprocess(folder: Path, encoder: ImageEncoder) -> Any:
    """Return the image processor that a folder's preprocessor_config.json describes, and note its settings.

    Raises:
        Problem: there is none, or it makes images of different sizes.
    """
    from transformers import AutoImageProcessor

    from ip_adapter_trainer.core.errors import Problem, as_load_problem

    file = folder / "preprocessor_config.json"
    remedy = "copy it from where the model came from: without it nobody knows how its images are cut and normalised"
    if not file.is_file():
        raise Problem("the image encoder has no preprocessor_config.json", where=str(folder), remedy=remedy)
    with as_load_problem("the image encoder's preprocessing", str(file), remedy):
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    made = [processor(images=_blank().resize(size), return_tensors="np")["pixel_values"] for size in _SIZES]
    sizes = {tuple(pixels.shape) for pixels in made}
    if len(sizes) != 1 or (shape := next(iter(sizes)))[-1] != shape[-2]:
        what = f"its preprocessing makes images of {' and '.join(map(str, sorted(sizes)))}, and one square is needed"
        raise Problem(what, where=str(file), remedy="take a model of fixed resolution")
    settings = processor.to_dict()
    encoder.preprocessing = {name: settings[name] for name in sorted(settings) if settings[name] is not None}
    return processor
