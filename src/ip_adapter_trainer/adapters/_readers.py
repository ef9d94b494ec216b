"""Which of the three readers can take an adapter file as it is meant, and why not.

Checked against diffusers 0.42 (`loaders/unet.py`), tencent-ailab/IP-Adapter (`ip_adapter/ip_adapter.py`) and
cubiq/ComfyUI_IPAdapter_plus (`IPAdapterPlus.py`, `utils.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from ip_adapter_trainer.adapters._file import AdapterFile
from ip_adapter_trainer.adapters._layout import Origin
from ip_adapter_trainer.adapters._variant import SDXL_CONTEXT, Reader

READERS: dict[Reader, str] = {
    "diffusers": "diffusers",
    "original": "the original code",
    "comfy": "ComfyUI_IPAdapter_plus",
}
_LAYERS = {True: 70, False: 16}  # of SDXL, and of SD1.x and SD2.x


def refusals(file: AdapterFile) -> dict[Reader, str]:
    """For each reader that cannot take the file, the first reason."""
    sdxl = file.facts["context_dim"] == SDXL_CONTEXT
    reasons = [_of_layout(file.origin), _of_layers(file.numbers, sdxl), file.variant.refusals(file.shapes)]
    if "unnorm" in file.path.name.lower():
        reasons.append({"comfy": "takes a file for a face adapter when its name has 'unnorm' in it"})
    first: dict[Reader, str] = {}
    for reason in reasons:
        first = reason | first
    return {reader: first[reader] for reader in READERS if reader in first}


def _of_layout(origin: Origin) -> dict[Reader, str]:
    if origin == "published":
        return {}
    if origin == "comfy":
        reason = "does not look for the pairs under adapter_modules; export the file"
        return {"diffusers": reason, "original": reason}
    return dict.fromkeys(get_args(Reader), "takes no training checkpoint; export it")


def _of_layers(numbers: Sequence[int], sdxl: bool) -> dict[Reader, str]:
    missing = sorted(set(range(1, numbers[-1] + 1, 2)) - set(numbers))
    if missing:
        return dict.fromkeys(get_args(Reader), f"looks for {missing[0]}.to_k_ip.weight, which is not there")
    if len(numbers) != _LAYERS[sdxl]:
        model = "SDXL" if sdxl else "SD1.x and SD2.x"
        return {"comfy": f"knows {model} with {_LAYERS[sdxl]} layers, the file has {len(numbers)}"}
    return {}
