"""Base models: one file a family. A family checks its parts, encodes, names its attention sites and predicts."""

from ip_adapter_trainer.families._family import FAMILIES, PARTS, Family, PartName
from ip_adapter_trainer.families._text import Reach

__all__ = ["FAMILIES", "PARTS", "Family", "PartName", "Reach"]
