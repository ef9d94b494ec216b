"""Projectors: image features to tokens, with the state-dict keys of published adapter files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ImageProjection(nn.Module):
    """Linear(E, N * D), reshaped to N tokens and normalised; keys `proj.*` and `norm.*` (paper, section 3.2.1)."""

    def __init__(self, feature_dim: int, context_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(feature_dim, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project a feature [B, E] to tokens [B, N, D]."""
        tokens: Tensor = self.norm(self.proj(features).unflatten(-1, (self.num_tokens, -1)))
        return tokens


class FullProjection(nn.Module):
    """Linear, GELU, Linear, LayerNorm on each feature vector; keys `proj.0`, `proj.2`, `proj.3`."""

    def __init__(self, feature_dim: int, context_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.GELU(),
            nn.Linear(feature_dim, context_dim),
            nn.LayerNorm(context_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, T, E] to tokens [B, T, D]."""
        tokens: Tensor = self.proj(features)
        return tokens


class PerceiverAttention(nn.Module):
    """Latents attend to the picture's features and to themselves."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Return an update of the latents [B, N, W] from features [B, T, W] and latents [B, N, W]."""
        features, latents = self.norm1(features), self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([features, latents], 1)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        update: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return update


class Resampler(nn.Module):
    """Learned queries that read the features through `depth` perceiver layers; published keys, in published order."""

    def __init__(
        self,
        feature_dim: int,
        context_dim: int,
        *,
        num_tokens: int,
        width: int,
        heads: int,
        depth: int,
        head_dim: int,
        expansion: int,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, num_tokens, width) / math.sqrt(width))
        self.proj_in = nn.Linear(feature_dim, width)
        self.proj_out = nn.Linear(width, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)
        inner = width * expansion
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, heads, head_dim),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, inner, bias=False),
                        nn.GELU(),
                        nn.Linear(inner, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Resample features [B, T, E] to tokens [B, N, D]."""
        latents = self.latents.expand(len(features), -1, -1)
        features = self.proj_in(features)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens
