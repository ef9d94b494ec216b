"""Variants of the adapter, one file each: which image features become which tokens, and the settings of that."""

from ip_adapter_trainer.adapters._variant import IMAGE, VARIANTS, Shapes, Variant, shapes_of

__all__ = ["IMAGE", "VARIANTS", "Shapes", "Variant", "shapes_of"]
