"""The parts, text rules and prediction that all families with a `UNet2DConditionModel` share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.families._family import Codec, Denoiser, Family
from ip_adapter_trainer.families._fit import demand_unet
from ip_adapter_trainer.families._kl import KLCodec, without_parts

if TYPE_CHECKING:
    from torch import Tensor

    from ip_adapter_trainer.core.values import Geometry

# Not packed: the first and last convolution, the embeddings of time, which all layers read, and the projections of the
# text to keys and values, from which `ImageKV` starts.
_SPARED = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")


class UNetCodec(KLCodec):
    """A codec that encodes captions with CLIP text encoders."""

    def __init__(self, pipeline: Any, clip_skip: int | None) -> None:
        super().__init__(pipeline)
        self.clip_skip = clip_skip  # the text encoder's layer that is read, counted from its end; None: the usual

    def own_rules(self) -> list[Any]:
        """See `KLCodec.own_rules`."""
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        return [zeros, self.clip_skip] if self.clip_skip else [zeros]


class UNetDenoiser(Denoiser):
    """A `UNet2DConditionModel` that predicts epsilon or v, as the scheduler's config says."""

    layouts = ("unet", "unet_lora")
    layer_groups = {"up": ("up_blocks",)}  # noqa: RUF012

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.net = pipeline, pipeline.unet
        if self.net is not None:
            self.context_dim = int(self.net.config.cross_attention_dim)

    def install(self, processors: Mapping[str, Any]) -> None:
        """See `Denoiser.install`.

        Raises:
            Problem: a layer with norms around it, which no adapter was made for.
        """
        for name in processors:
            layer = self.net.get_submodule(name)
            if layer.group_norm is not None or layer.spatial_norm is not None or layer.residual_connection:
                raise Problem("this attention layer has norms that no adapter was made for", where=name)
        super().install(processors)

    def predict(self, noisy: Tensor, time: Tensor, text: dict[str, Tensor], geometry: Sequence[Geometry]) -> Tensor:
        """See `Denoiser.predict`; tensors in `text` other than `context` are added conditions."""
        extra = {name: tensor for name, tensor in text.items() if name != "context"} or None
        return self.net(noisy, time, text["context"], added_cond_kwargs=extra, return_dict=False)[0]

    def sampling(self, positive: dict[str, Tensor], negative: dict[str, Tensor] | None) -> dict[str, Any]:
        """See `Denoiser.sampling`."""
        return {"prompt_embeds": positive["context"], "negative_prompt_embeds": negative and negative["context"]}


class UNetFamily(Family):
    """A family with a `UNet2DConditionModel` as its denoiser and an `AutoencoderKL`."""

    components = {  # noqa: RUF012
        "autoencoder": ("vae",), "denoiser": ("unet",), "text": ("tokenizer", "text_encoder"),
    }  # fmt: skip
    classes = {  # noqa: RUF012
        "vae": ("AutoencoderKL",),
        "unet": ("UNet2DConditionModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    }
    # CLIP's vision half, and the text projection of an encoder that is loaded without it.
    spare = {"text_encoder": r"^(vision_model|visual_projection|text_projection)\."}  # noqa: RUF012

    pipeline_class: ClassVar[str]  # of diffusers
    codec: ClassVar[type[UNetCodec]]
    denoiser: ClassVar[type[UNetDenoiser]] = UNetDenoiser
    addition: ClassVar[str | None] = None  # the UNet's `addition_embed_type`
    left_out: ClassVar[Mapping[str, Any]]  # arguments that make the pipeline without what training never needs

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """Return whether a pipeline has the family's parts, whatever its task; null parts are reported later."""
        entries = {name: entry for name, entry in model_index.items() if isinstance(entry, list) and len(entry) == 2}
        has_second = "text_encoder_2" in entries
        return has_second == ("text_encoder_2" in cls.classes) and all(
            name in entries and (entries[name][1] is None or entries[name][1] in kinds)
            for name, kinds in cls.classes.items()
            if name in ("unet", "text_encoder", "text_encoder_2")
        )

    @classmethod
    def demand(cls, settings: Mapping[str, Mapping[str, Any]], clip_skip: int | None, where: str) -> None:
        """See `Family.demand`: channels, conditions and widths."""
        demand_unet(settings, cls.addition, where)

    @classmethod
    def assemble(
        cls, loaded: Mapping[str, Any], model_index: Mapping[str, Any], config: Part, clip_skip: int | None
    ) -> tuple[Codec, Denoiser]:
        """See `Family.assemble`."""
        import diffusers

        kind = getattr(diffusers, cls.pipeline_class)
        taken = inspect.signature(kind.__init__).parameters
        said = {name: value for name, value in model_index.items() if name in taken and not isinstance(value, list)}
        absent = [name for name in cls.classes if name not in loaded]
        pipeline = without_parts(kind, dict(loaded), {**said, **cls.left_out}, absent)
        return cls.codec(pipeline, clip_skip), cls.denoiser(pipeline)

    @classmethod
    def spared(cls, layer: str) -> bool:
        """See `Family.spared`."""
        return any(part in layer for part in _SPARED)
