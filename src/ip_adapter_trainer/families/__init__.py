"""Base models: one file a family. A family loads frozen parts, encodes, names its attention sites and predicts."""

from ip_adapter_trainer.families._family import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of"]
