"""Adapter files: read in every known form, written in the published one, and described by a card."""

from ip_adapter_trainer.adapter_files.card import CARD, AdapterCard
from ip_adapter_trainer.adapter_files.file import (
    AdapterFile,
    check_suffix,
    find_weights,
    read_adapter,
    weights_sha256,
    write_adapter,
)
from ip_adapter_trainer.adapter_files.readers import READERS, refusals
from ip_adapter_trainer.adapter_files.start import fitting_config, flags_to_fit

__all__ = [
    "CARD",
    "READERS",
    "AdapterCard",
    "AdapterFile",
    "check_suffix",
    "find_weights",
    "fitting_config",
    "flags_to_fit",
    "read_adapter",
    "refusals",
    "weights_sha256",
    "write_adapter",
]
