"""Variants of the adapter, one file each (a projector from image features to tokens, and its config); adapter files."""

from ip_adapter_trainer.adapters._card import CARD, AdapterCard
from ip_adapter_trainer.adapters._file import (
    AdapterFile,
    check_suffix,
    find_weights,
    read_adapter,
    weights_sha256,
    write_adapter,
)
from ip_adapter_trainer.adapters._readers import READERS, refusals
from ip_adapter_trainer.adapters._start import fitting_config, flags_to_fit
from ip_adapter_trainer.adapters._variant import VARIANTS, Reader, Variant

__all__ = [
    "CARD",
    "READERS",
    "VARIANTS",
    "AdapterCard",
    "AdapterFile",
    "Reader",
    "Variant",
    "check_suffix",
    "find_weights",
    "fitting_config",
    "flags_to_fit",
    "read_adapter",
    "refusals",
    "weights_sha256",
    "write_adapter",
]
