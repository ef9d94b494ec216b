"""Variants of the adapter: one file each. A variant is a projector from image features to tokens, and its config."""

from ip_adapter_trainer.adapters._card import AdapterCard
from ip_adapter_trainer.adapters._variant import VARIANTS, Reader, Variant

__all__ = ["VARIANTS", "AdapterCard", "Reader", "Variant"]
