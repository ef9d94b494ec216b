"""Layouts, one file each: where an adapter sits in a denoiser, what is trained there, and how files name it."""

from ip_adapter_trainer.layouts._layout import (
    LAYOUTS,
    LayerModule,
    Layout,
    Probe,
    Reader,
    Tables,
    choose_layers,
    choose_layout,
    make_layout,
)

__all__ = [
    "LAYOUTS",
    "LayerModule",
    "Layout",
    "Probe",
    "Reader",
    "Tables",
    "choose_layers",
    "choose_layout",
    "make_layout",
]
