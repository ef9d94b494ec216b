"""What a variant is, and the registry of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.settings import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

Reader = Literal["diffusers", "original", "comfy"]
Shapes = Mapping[str, tuple[int, ...]]
SDXL_CONTEXT = 2048  # by this width of the tokens the readers tell SDXL from all else


class Variant(ABC):
    """One adapter architecture.

    A subclass lives in a file of its own, registers a name and gives its settings, the encoder feature it takes and
    its projector, whose state-dict keys are the published ones.
    """

    Config: ClassVar[type[Part]]
    feature: ClassVar[Literal["image_embeds", "penultimate"]]

    @classmethod
    @abstractmethod
    def projector(cls, config: Part, *, context_dim: int, feature_dim: int, feature_length: int) -> nn.Module:
        """The module from features ([B, E], or [B, T, E] with T = `feature_length`) to tokens [B, N, context_dim].

        Raises:
            Problem: a setting with which a reader would refuse the file, or load it and compute something else.
        """

    @classmethod
    @abstractmethod
    def owns(cls, shapes: Shapes) -> bool:
        """Whether these `image_proj` keys and shapes are this variant's."""

    @classmethod
    @abstractmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """What a file's `image_proj` shapes tell: `num_tokens`, `feature_dim`, `context_dim` and the variant's own."""

    @classmethod
    @abstractmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """For each reader that cannot take such a file as it is meant, the reason."""


VARIANTS: Registry[Variant] = Registry("variants", "ip_adapter_trainer.adapters")


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
