"""Image encoders: pictures to features, and the feature that stands for "no picture"."""

from ip_adapter_trainer.encoders.clip import FEATURES, ClipImageEncoder, FeatureKind

__all__ = ["FEATURES", "ClipImageEncoder", "FeatureKind"]
