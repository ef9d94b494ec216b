"""The interface of a variant, and the registry of all variants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import ImageTokens, Need
from ip_adapter_trainer.layouts import Reader

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
IMAGE = "image"  # the role of the image prompt itself


class Variant(ABC):
    """One adapter architecture.

    A subclass lives in a file of its own, registers a name and defines its settings, the features that it reads and
    its projector, whose state-dict keys are the published ones.

    Attributes:
        needs: features that it reads; the encoder of a role other than `image` is at the setting `ROLE_encoder_path`.
        layouts: names of the layouts that it goes with.
        drops: names of what else is dropped in training, beside image and text, with the share of samples.
        reads_time: True if tokens depend on the time.
    """

    Config: ClassVar[type[Part]]
    needs: ClassVar[tuple[Need, ...]]
    layouts: ClassVar[tuple[str, ...]] = ("unet", "unet_lora", "own")
    drops: ClassVar[Mapping[str, float]] = {}
    reads_time: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def projector(cls, config: Part, shapes: Mapping[Need, tuple[int, ...]], token_dim: int) -> nn.Module:
        """Return the module that turns features of these shapes, (E) or (T, E) each, into tokens of width `token_dim`.

        Raises:
            Problem: with some setting, a reader would refuse the file, or load it and compute something else.
        """

    @classmethod
    def tokens(
        cls,
        projector: nn.Module,
        features: Mapping[Need, Tensor],
        time: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> ImageTokens:
        """Return tokens [B, N, D] of features, [B, E] or [B, T, E] each.

        Args:
            projector: the module that `projector` returned.
            features: all of `needs`; those of "no image" where it is dropped.
            time: [B], where `reads_time`.
            dropped: for each name of `drops`, the samples where it is dropped, bool [B]; None: nothing is dropped.
        """
        (need,) = cls.needs
        return ImageTokens(projector(features[need]))

    @classmethod
    @abstractmethod
    def owns(cls, shapes: Shapes) -> bool:
        """Return whether these `image_proj` keys and shapes are this variant's."""

    @classmethod
    @abstractmethod
    def facts(cls, shapes: Shapes) -> dict[str, int]:
        """Return what a file's `image_proj` shapes tell: `num_tokens`, `context_dim` and the variant's own settings.

        `feature_dim` is the last dimension of the first of `needs`; that of others is `feature_dim_NAME`.
        """

    @classmethod
    @abstractmethod
    def refusals(cls, shapes: Shapes) -> dict[Reader, str]:
        """Return, for each reader that cannot use such a file as intended, the reason."""


VARIANTS: Registry[Variant] = Registry("variants", "ip_adapter_trainer.adapters")


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of tensors [...] by their names."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
