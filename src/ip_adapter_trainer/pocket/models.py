"""The architectures of the pocket base: ordinary diffusers and transformers classes at pocket size.

Sizes were chosen so that two CPU cores train all of it in about two hours and the packed weights stay under 32 MB.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ip_adapter_trainer.pocket import world

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

LATENT_SIDE = world.SIZE_PX // 4
MAX_TOKENS = 16
TEXT_WIDTH = 128


@lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    """Return a CLIP byte-pair tokenizer: a word of the world is one token or few, and other text still encodes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    symbols, merges = [*letters, *(c + "</w>" for c in letters)], []
    named = [word for values in world.ATTRIBUTES.values() for word in values]
    for word in sorted({*named, "a", "on", "thing", "background"}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            symbols.append(parts[0])
    merges, symbols = list(dict.fromkeys(merges)), list(dict.fromkeys(symbols))
    vocab = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def clip() -> CLIPModel:
    """Return a two-tower CLIP: a 3-layer ViT over 4 px patches and a 2-layer text transformer, both 128 wide."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=world.SIZE_PX, patch_size=4,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def image_processor() -> CLIPImageProcessorPil:
    """Return the preprocessing of the pocket image encoder, as diffusers derives it from the encoder's `image_size`."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": world.SIZE_PX}, crop_size=world.SIZE_PX)


def autoencoder() -> AutoencoderKL:
    """Return a KL autoencoder, from 32 px to an 8x8x4 latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=world.SIZE_PX, mid_block_add_attention=False,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """Return a two-level UNet with text cross-attention at 8x8, 4x4 and in the middle (7 adapted layers)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Return the noise process of Stable Diffusion 1.x: epsilon prediction, scaled-linear betas."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


def weights_dir() -> Path:
    """Return the folder of the packed weights inside the package."""
    return Path(__file__).parent / "weights"
