"""The published layout of UNets: a key/value pair at every cross-attention layer (arXiv 2308.06721, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.log import silent_diffusers
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.core.values import AttentionLayer
from ip_adapter_trainer.layouts._layout import LAYOUTS, Layout, Probe, Reader

if TYPE_CHECKING:
    from torch import Tensor

    from ip_adapter_trainer.nn.attention import ImagePrompt

SDXL_CONTEXT = 2048  # by this width of the tokens the readers tell SDXL from all else
_PROCESSOR = ".processor"
_PAIR = re.compile(r"(0|[1-9][0-9]{0,3})\.to_[kv]_ip\.weight")  # SDXL has numbers up to 139
_LAYERS = {True: 70, False: 16}  # of SDXL, and of SD1.x and SD2.x
_REMEDY = "`ip-adapter inspect` tells what kind of file it is"


def attention_layers(net: Any) -> list[AttentionLayer]:
    """Return all attention layers of a `UNet2DConditionModel`.

    N counts every attention processor in module order (down, up, mid), so cross-attention has the odd numbers.
    """
    found = []
    for number, key in enumerate(net.attn_processors):
        name = key.removesuffix(_PROCESSOR)
        layer = net.get_submodule(name)
        is_cross = name.endswith("attn2")
        context_dim = layer.to_k.weight.shape[1] if is_cross else None
        kind: Any = "cross" if is_cross else "self"
        found.append(AttentionLayer(number, name, kind, layer.to_q.out_features, layer.heads, context_dim))
    return found


def demand_pairs(layers: Mapping[str, Tensor], where: str) -> None:
    """Demand key/value pairs: every N odd, every pair whole and its two shapes [width, D] equal.

    Raises:
        Problem: the first that is not.
    """
    for name, tensor in layers.items():
        match = _PAIR.fullmatch(name)
        if match is None:
            what = f"ip_adapter.{name} is no part of an adapter that this trainer trains"
            raise Problem(what, where=where, remedy=_REMEDY)
        if int(match[1]) % 2 == 0:
            what = f"ip_adapter.{name}: cross-attention layers have odd numbers in a UNet's adapter"
            raise Problem(what, where=where, remedy=_REMEDY)
        other = name.replace("to_k_ip", "to_?_ip").replace("to_v_ip", "to_k_ip").replace("to_?_ip", "to_v_ip")
        if other not in layers:
            raise Problem(f"ip_adapter.{other} is missing", where=where, remedy="copy or download the file again")
        if tensor.ndim != 2 or tensor.shape != layers[other].shape:
            shapes = f"{list(tensor.shape)} and {list(layers[other].shape)}"
            raise Problem(f"ip_adapter.{name} and its other half have shapes {shapes}", where=where, remedy=_REMEDY)


@LAYOUTS.register("unet")
class UNetLayout(Layout):
    """`N.to_k_ip.weight` and `N.to_v_ip.weight`, without biases, for every cross-attention layer N."""

    reader = "diffusers"

    def layers(self, denoiser: Any) -> list[AttentionLayer]:
        """See `Layout.layers`."""
        return [layer for layer in attention_layers(denoiser.net) if layer.kind == "cross"]

    def module(self, layer: AttentionLayer, token_dim: int, config: Part) -> Any:
        """See `Layout.module`."""
        from ip_adapter_trainer.nn.attention import ImageKV

        return ImageKV(token_dim, layer.width)

    def processor(self, layer: AttentionLayer, module: Any, prompt: ImagePrompt, original: Any) -> Any:
        """See `Layout.processor`."""
        from ip_adapter_trainer.nn.attention import DecoupledProcessor

        return DecoupledProcessor(module, prompt, original)

    def owns(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """See `Layout.owns`."""
        return bool(layers) and all(".to_k_ip." in name or ".to_v_ip." in name for name in layers)

    def demand(self, layers: Mapping[str, Tensor], where: str) -> None:
        """See `Layout.demand` and `demand_pairs`."""
        demand_pairs(layers, where)

    def refusals(self, layers: Mapping[str, tuple[int, ...]], context_dim: int) -> dict[Reader, str]:
        """See `Layout.refusals`."""
        numbers = sorted({int(name.split(".")[0]) for name in layers})
        missing = sorted(set(range(1, numbers[-1] + 1, 2)) - set(numbers))
        if missing:
            return dict.fromkeys(get_args(Reader), f"looks for {missing[0]}.to_k_ip.weight, which is not there")
        sdxl = context_dim == SDXL_CONTEXT
        if len(numbers) != _LAYERS[sdxl]:
            model = "SDXL" if sdxl else "SD1.x and SD2.x"
            return {"comfy": f"knows {model} with {_LAYERS[sdxl]} layers, the file has {len(numbers)}"}
        return {}

    def verify(self, denoiser: Any, file: Path, probe: Probe) -> Tensor | None:
        """See `Layout.verify`: diffusers' `load_ip_adapter`, its projector and, for CLIP, its own "no image".

        It runs CLIP encoders alone; features of others are handed to it, as its users would.
        """
        pipeline, is_clip = denoiser.pipeline, probe.encoder.kind == "clip"
        if is_clip:
            pipeline.register_modules(image_encoder=probe.encoder.model)
        try:
            with silent_diffusers():
                pipeline.load_ip_adapter(
                    str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None
                )
            pipeline.set_ip_adapter_scale(1.0)
            given = None if is_clip else [feature[:, None] for feature in probe.features.values()]
            embeds = pipeline.prepare_ip_adapter_image_embeds(
                probe.pixels if is_clip else None, given, pipeline.device, 1, True
            )
            text = {**probe.text, "image_embeds": embeds}
            return denoiser.predict(probe.noisy, probe.time, text, probe.geometry)
        finally:
            self.unload(pipeline)

    def unload(self, pipeline: Any) -> None:
        """Take everything out of a pipeline that `verify` put in."""
        pipeline.unload_ip_adapter()
