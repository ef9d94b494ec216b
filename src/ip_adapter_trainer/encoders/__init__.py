"""Image encoders: pictures to features, and the feature that stands for "no picture"."""

from ip_adapter_trainer.encoders.clip import ClipImageEncoder, FeatureKind

__all__ = ["ClipImageEncoder", "FeatureKind"]
