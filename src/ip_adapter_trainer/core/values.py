"""Values that the parts hand on: rows, samples, batches, conditions. Frozen dataclasses, shapes at the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ip_adapter_trainer.core.errors import Fault

if TYPE_CHECKING:
    import torch
    from torch import Tensor

P = TypeVar("P", bound="Pixels | Encoded")

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Row:
    """One row of a manifest, as read. Paths are relative to the image root."""

    image_file: str
    text: str | tuple[str, ...]  # the caption, empty if there is none; or several, of which each use draws one
    prompt_image_file: str | None = None  # another image to prompt with; None: the target itself

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption that may be drawn."""
        return (self.text,) if isinstance(self.text, str) else self.text

    def caption(self, seed: int, counter: int) -> str:
        """Return the caption, or the one of several that is drawn by a seed and the number of this use."""
        captions = self.captions
        if len(captions) == 1:
            return captions[0]
        from ip_adapter_trainer.core.rng import stream

        return captions[stream(seed, "caption", counter).integers(len(captions))]


@dataclass(frozen=True)
class Geometry:
    """The cut of a target in pixels (height, width), as SDXL's micro-conditioning wants it."""

    original_px: Size
    crop_px: tuple[int, int]  # top, left, in the resized image
    target_px: Size


@dataclass(frozen=True, order=True)
class Need:
    """One thing that a variant reads of a sample: a feature of one of its images."""

    role: str  # what the image is, which decides the encoder that it goes to: `image`, or another that a variant names
    feature: str  # one of the encoder's, as `image_embeds` or `penultimate`

    @property
    def name(self) -> str:
        """The name that files and cards use: the feature's own, after the role where that is not `image`."""
        return self.feature if self.role == "image" else f"{self.role}_{self.feature}"


@dataclass(frozen=True)
class ImageTokens:
    """The output of a projector for image features, for every adapted layer of a denoiser to attend to."""

    tokens: Tensor  # [B, N, D]
    time_embedding: Tensor | None = None  # [B, E], where layers are modulated by the time too


@dataclass(frozen=True)
class Pixels:
    """A target and its image prompts as read; stacked in a batch."""

    pixels: Tensor  # [3, H, W] or [B, 3, H, W], in -1..1
    prompts: dict[str, Tensor]  # by role, [3, S, S] or [B, 3, S, S], preprocessed for the role's encoder


@dataclass(frozen=True)
class Encoded:
    """The same as the frozen encoders see them, prepared before training; stacked in a batch."""

    moments: Tensor  # [2C, h, w] or [B, 2C, h, w]: mean and log variance of the latents' posterior, unscaled
    features: dict[Need, Tensor]  # of the image prompts, [E] or [T, E], or with [B, ...]
    text: dict[str, Tensor] = field(default_factory=dict)  # of the caption, as the base model's codec gives it; or none


Inputs = Pixels | Encoded


@dataclass(frozen=True)
class Batch:
    """Training images of one size, decoded and cropped, stacked.

    `index` is an image's place in the endless order (epoch * rows + place in the epoch's permutation): the counter of
    every random draw that concerns it. `row` is the row that supplied the pixels. A dropped text is empty.
    """

    index: Tensor  # [B] int64
    row: Tensor  # [B] int64
    inputs: Inputs
    text: tuple[str, ...]
    geometry: tuple[Geometry, ...]
    drop_text: Tensor  # [B] bool
    drop_image: Tensor  # [B] bool
    faults: tuple[Fault, ...] = ()  # rows that were tried before those and could not be read

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with its tensors on `device`."""
        return replace(self, inputs=map_tensors(lambda t: to_device(t, device), self.inputs))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor [...] to a device without making the host wait for the device's earlier work.

    An ordinary copy from pageable memory waits until the device has done all that was asked of it before; from pinned
    memory it takes its place behind that, and the host goes on. Pinned blocks are kept and used again by PyTorch.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def map_tensors(function: Callable[..., Tensor], first: P, *others: P) -> P:
    """Return inputs of the same kind with each tensor replaced by `function` of it, [...], and of those of `others`."""
    names = [f.name for f in fields(first)]
    return type(first)(**{name: _mapped(function, *(getattr(p, name) for p in (first, *others))) for name in names})


def _mapped(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    if isinstance(first, dict):
        return {name: function(tensor, *(other[name] for other in others)) for name, tensor in first.items()}
    return function(first, *others)


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer of a denoiser, to which an adapter can add."""

    number: int  # N of the file contract's keys, as `N.to_k_ip.weight`
    name: str  # the layer's module path in the denoiser
    kind: Literal["cross", "self", "joint", "single"]  # what its queries attend to
    width: int  # inner width: rows of to_q
    heads: int
    context_dim: int | None  # columns of to_k and to_v where they read another sequence
