"""Noise processes and objectives: pure maths over a scheduler's config."""

from ip_adapter_trainer.diffusion.objective import NoiseProcess, ObjectiveConfig

__all__ = ["NoiseProcess", "ObjectiveConfig"]
