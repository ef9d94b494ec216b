"""Image encoders, one file each: images to features by name, and what stands for "no image"."""

from ip_adapter_trainer.encoders._encoder import ENCODERS, ImageEncoder, folder_preprocess

__all__ = ["ENCODERS", "ImageEncoder", "folder_preprocess"]
