"""Base models, one file a family: a codec for images and captions, a denoiser with its attention and its noise."""

from ip_adapter_trainer.families._family import FAMILIES, PARTS, BaseModel, Codec, Denoiser, Family, PartName
from ip_adapter_trainer.families._kl import KLCodec, without_parts
from ip_adapter_trainer.families._text import Reach

__all__ = [
    "FAMILIES",
    "PARTS",
    "BaseModel",
    "Codec",
    "Denoiser",
    "Family",
    "KLCodec",
    "PartName",
    "Reach",
    "without_parts",
]
