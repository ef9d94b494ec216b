"""What a training step needs in memory, counted on fake tensors: real sizes, no weights, no GPU.

    python -m benchmarks.memory_budget [--sizes sd15,sdxl] [--layers all] [--stock_layers]

A step runs whole, forward and backward, by the package's own model and layers, one image in bf16, base adapter, rows
encoded beforehand. Every storage that an operation makes is counted from its first use to its last, so that the peak
holds activations, expanded weights and temporaries alike. Attention is counted as a fused kernel, which keeps queries,
keys, values and output. What a device holds besides is not counted: its context (some 0.5 GB with CUDA), workspaces of
convolutions, fragmentation.
"""

from __future__ import annotations

import argparse
import weakref
from dataclasses import dataclass
from typing import Any

import bitsandbytes  # noqa: F401  (its operations; it cannot be imported while tensors are fake)
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.sizes import SIZES, Size, build, model_of
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.nn.packed import Storage, pack
from ip_adapter_trainer.train.config import LeanConfig
from ip_adapter_trainer.train.lean import lean

SIDES_PX = {"tiny": 32, "half": 512, "sd15": 512, "sdxl": 1024}
STORAGES: tuple[Storage, ...] = ("none", "int8", "nf4")
TEXT_TOKENS = 77
GB = 1e9
# Bytes for each trained weight: master and gradient in fp32, two moments in fp32 or in 8 bits with a scale for 256.
MASTER, MOMENTS, MOMENTS_8BIT = 8, 8, 2 * (1 + 4 / 256)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are let go of.

    Attributes:
        now: bytes alive.
        peak: the most that ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what is new in its result."""
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), None)
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage.nbytes())
        return out

    def _release(self, size_bytes: int) -> None:
        self.now -= size_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Budget:
    """What one step needs, in bytes."""

    denoiser: int
    texts: int  # text encoders
    encoders: int  # VAE and image encoder, which rows that were encoded beforehand make needless
    decoder: int  # the half of the VAE that stays
    trained: int  # weights that are trained, as a number
    step: int  # peak of a forward and backward pass beyond all of these
    encode: int  # peak of encoding one picture beyond the encoders
    draw: int  # peak of drawing one picture, guided, and of decoding it

    def total(self, moments: float, *, texts: bool = True) -> float:
        """The peak with so many bytes of optimizer moments for each trained weight, with or without text encoders."""
        return self._kept(moments) + texts * self.texts + self.step

    @property
    def encoding(self) -> int:
        """The peak of preparing, which is over before the denoiser is there."""
        return self.texts + self.encoders + self.encode

    def drawing(self, moments: float) -> float:
        """The peak of a validation's grid, one picture at once, while the text encoders rest on the host."""
        return self._kept(moments) + self.decoder + self.draw

    def _kept(self, moments: float) -> float:
        return self.denoiser + self.trained * (MASTER + moments)


def budget(
    size: Size,
    side_px: int,
    storage: Storage,
    *,
    recompute: bool,
    layers: tuple[str, ...] = ("all",),
    images: int = 1,
    lean_layers: bool = True,
) -> Budget:
    """Counts a step at some size."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        nets = build(size, "cpu")
        torch.set_default_dtype(torch.float32)
        pipeline = nets.pipeline
        pack(pipeline.unet, storage, "cpu", FAMILIES[size.family].spared)
        vae, pipeline.vae = pipeline.vae, None  # a codec would lay it out anew, which fake weights do not bear
        model = model_of(size, nets, layers)
        pipeline.vae = vae
        if recompute:
            model.checkpoint_activations()
        trained = [p for p in model.adapter.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        _lay_channels_last(pipeline.unet)
        plain = LeanConfig(lean_layers=lean_layers, channels_last="off")
        with model.attached(), lean(model, plain), LiveBytes() as live:
            step(model, size, side_px, images)
        draw = _drawing(model, size, side_px)
        texts = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        return Budget(
            bytes_of(pipeline.unet),
            sum(map(bytes_of, texts)),
            bytes_of(pipeline.vae) + bytes_of(nets.image_encoder),
            bytes_of(pipeline.vae.decoder),
            sum(p.numel() for p in trained),
            live.peak,
            _encoding(model, side_px),
            draw,
        )


@torch.no_grad()
def _encoding(model: Model, side_px: int) -> int:
    """Peak bytes of one picture's way through the encoders."""
    _lay_channels_last(model.codec.autoencoder)
    with LiveBytes() as live:
        model.codec.moments(torch.randn(1, 3, side_px, side_px))
        model.features({"image": torch.randn(1, 3, model.encoder.side_px, model.encoder.side_px)})
    return live.peak


@torch.no_grad()
def _drawing(model: Model, size: Size, side_px: int) -> int:
    """Peak bytes of a guided step of one picture, with prompts and without, and of decoding it."""
    latents = torch.randn(1, *model.codec.latent_shape(side_px, side_px), dtype=model.dtype)
    with model.attached(), LiveBytes() as live:
        predicted(model, size, side_px, images=2)
        model.codec.autoencoder.decode(latents)
    return live.peak


def _lay_channels_last(net: nn.Module) -> None:
    """As `lean` does; fake weights can be replaced, not laid out anew."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 4:
                laid_out = parameter.contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(laid_out, requires_grad=False))


def step(model: Model, size: Size, side_px: int, images: int) -> None:
    """Forward and backward over an encoded batch."""
    prediction = predicted(model, size, side_px, images)
    (prediction.float() - torch.randn_like(prediction).float()).square().mean().backward()


def predicted(model: Model, size: Size, side_px: int, images: int) -> Tensor:
    """The denoiser's output over an encoded batch."""
    dtype, (need,) = model.dtype, model.variant.needs
    noisy = torch.randn(images, *model.codec.latent_shape(side_px, side_px), dtype=dtype)
    features = torch.randn(images, size.image["projection_dim"], dtype=dtype)
    text = {"context": torch.randn(images, TEXT_TOKENS, model.denoiser.context_dim, dtype=dtype)}
    if size.family == "sdxl":
        text["text_embeds"] = torch.randn(images, size.texts[1]["projection_dim"], dtype=dtype)
    timesteps, side = torch.zeros(images, dtype=torch.long), (side_px, side_px)
    image = model.project({need: features})
    return model.predict(noisy, timesteps, text, [Geometry(side, (0, 0), side)] * images, image)


def table(names: list[str], **how: Any) -> list[str]:
    """Markdown lines: every storage of every size, activations kept and recomputed, moments of 32 and 8 bits, in GB."""
    lines = [
        "| one image, GB | frozen denoiser | activations | denoiser | text | adapter, gradients | step "
        "| total, Adam 32-bit | 8-bit | 8-bit, captions prepared | encoding before | drawing, 8-bit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for storage in STORAGES:
            for recompute in (False, True):
                found = budget(SIZES[name], SIDES_PX[name], storage, recompute=recompute, **how)
                label = f"{name}, {SIDES_PX[name]} px"
                activations = "recomputed" if recompute else "kept"
                numbers = (
                    found.denoiser, found.texts, found.trained * MASTER, found.step, found.total(MOMENTS),
                    found.total(MOMENTS_8BIT), found.total(MOMENTS_8BIT, texts=False), found.encoding,
                    found.drawing(MOMENTS_8BIT),
                )  # fmt: skip
                cells = [label, "bf16" if storage == "none" else storage, activations]
                lines.append("| " + " | ".join((*cells, *(f"{n / GB:.2f}" for n in numbers))) + " |")
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="sd15,sdxl", help="names out of benchmarks/sizes.py")
    parser.add_argument("--layers", default="all", help="layers that carry an adapter, as --adapter_layers")
    parser.add_argument("--stock_layers", action="store_true", help="without lean layers")
    given = parser.parse_args()
    how = {"layers": tuple(given.layers.split(",")), "lean_layers": not given.stock_layers}
    print("\n".join(table(given.sizes.split(","), **how)))


if __name__ == "__main__":
    main()
