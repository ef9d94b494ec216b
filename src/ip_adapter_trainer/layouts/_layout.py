"""The interface of a layout, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.settings import Part

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ip_adapter_trainer.core.values import AttentionLayer, Geometry, Need
    from ip_adapter_trainer.nn.attention import ImagePrompt

Reader = Literal["diffusers", "original", "comfy"]
Tables = Mapping[str, Mapping[str, "Tensor"]]  # `image_proj`, the projector; `ip_adapter`, the layers by "N."


class LayerModule(Protocol):
    """The module trained at one attention layer: an `nn.Module` whose state-dict keys follow "N." in files."""

    def start_from(self, attention: Any) -> None:
        """Set the initial weights, from those of the frozen attention layer."""

    def silence(self) -> None:
        """Set weights with which the layer computes the same as in the base model."""


@dataclass(frozen=True)
class Probe:
    """Fixed inputs for two samples, "no image" first and an image second, as guided pipelines order them."""

    noisy: Tensor  # [2, C, h, w]
    time: Tensor  # [2]
    text: dict[str, Tensor]  # of two captions
    geometry: Sequence[Geometry]
    pixels: Tensor  # [1, 3, S, S], preprocessed
    features: Mapping[Need, Tensor]  # [2, ...]
    encoder: Any  # the image encoder of the role `image`


class Layout:
    """The place of an adapter in a denoiser, and the form of its files.

    A subclass lives in a file of its own and registers a name. A variant and a base model each list the layouts that
    they go with; the first that both list is taken, or the one that is asked for.

    Attributes:
        reader: name, for messages, of the program that `verify` loads a file with.
        families: names of families that the layout adds itself to.
        variants: names of variants that the layout adds itself to.
        name: the name under which the class is registered.
    """

    reader: ClassVar[str] = "this package's own reader"
    families: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ()
    name: str

    Config: ClassVar[type[Part]] = Part

    def layers(self, denoiser: Any) -> list[AttentionLayer]:
        """Return the attention layers that files hold weights for, in the order and numbering of the file contract.

        There are none by default; a layout with layers also says `module` and `processor`.
        """
        return []

    def module(self, layer: AttentionLayer, token_dim: int, config: Part) -> Any:
        """Return the module trained at a layer, a `LayerModule`, for tokens of width `token_dim`."""
        raise TypeError(f"the layout {self.name} has layers and no `module` for them")

    def processor(self, layer: AttentionLayer, module: Any, prompt: ImagePrompt, original: Any) -> Any:
        """Return a diffusers attention processor for a layer; without an image prompt, it calls the original one."""
        raise TypeError(f"the layout {self.name} has layers and no `processor` for them")

    def token_dim(self, denoiser: Any) -> int:
        """Return the width of image tokens: by default, that of the text that the denoiser reads."""
        return denoiser.context_dim

    def condition(self, text: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Return the text condition, with image tokens [B, N, D] in it if the layout joins them to the text."""
        return text

    def null(self, need: Need) -> str:
        """Return the rule that makes the "no image" value of a feature; see `ImageEncoder.null`.

        It is what the layout's readers feed as unconditional.
        """
        return "zeros" if need.feature == "image_embeds" else "zero_pixels"

    def owns(self, layers: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether a file's layer weights, by name and shape, are this layout's."""
        return False

    def demand(self, layers: Mapping[str, Tensor], where: str) -> None:
        """Demand layer weights [...] that every reader can place.

        Raises:
            Problem: a weight cannot be placed; the first one is named.
        """

    def settings(self, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the layout's settings, read off a file's layer weights by name and shape."""
        return {}

    def refusals(self, layers: Mapping[str, tuple[int, ...]], context_dim: int) -> dict[Reader, str]:
        """Return, for each reader that cannot use such layer weights as intended, the reason."""
        why = "has no layout of this kind"
        return {"diffusers": why, "original": why, "comfy": why}

    def to_file(self, tables: Tables) -> dict[str, Tensor]:
        """Return an adapter's tensors [...] under the names of the published file."""
        return {f"{table}.{name}": tensor for table, tensors in tables.items() for name, tensor in tensors.items()}

    def verify(self, denoiser: Any, file: Path, probe: Probe) -> Tensor | None:
        """Load a file with another program's reader, and unload it without a trace.

        Returns:
            The denoiser's output [2, C, h, w] for the probe; None: there is no other reader.

        Raises:
            Exception: whatever the reader raises against the file.
        """
        return None


LAYOUTS: Registry[Layout] = Registry("layouts", "ip_adapter_trainer.layouts")


def choose_layout(
    asked: str | None, variant: str, of_variant: Sequence[str], family: str, of_base: Sequence[str]
) -> Layout:
    """Return the layout that is asked for, else the first that a variant and a base model go with.

    Both list the layouts that they know, the base model's usual one first; layouts may add themselves to either.

    Raises:
        Problem: they have none in common, or not the one that is asked for.
    """
    others = [name for name, entry in LAYOUTS.items() if family in entry.families and name not in of_base]
    goes = [n for n in (*of_base, *others) if n in of_variant or variant in LAYOUTS[n].variants]
    if asked is not None and asked not in goes:
        what = f"{asked!r} is no layout of the variant {variant} on a base model of the family {family}"
        raise Problem(what, where="--layout", remedy=did_you_mean(asked, goes))
    if not goes:
        what = f"the variant {variant} goes with the layouts {', '.join(of_variant)}, the base model with "
        what += ", ".join((*of_base, *others))
        raise Problem(what, where="--variant", remedy="take another variant or another base model")
    return make_layout(asked or goes[0])


def make_layout(name: str) -> Layout:
    """Return a new layout, by its name.

    Raises:
        Problem: there is none of this name.
    """
    layout = LAYOUTS[name]()
    layout.name = name
    return layout


def choose_layers(
    layers: Sequence[AttentionLayer], names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> list[AttentionLayer]:
    """Return the layers that names stand for: `all`, a group of beginnings, or the beginning of layers' names.

    Raises:
        Problem: a name that stands for no layer.
    """
    chosen = set[str]()
    for name in names:
        beginnings = ("",) if name == "all" else groups.get(name, (name,))
        whole = tuple(f"{b}." if b and not b.endswith(".") else b for b in beginnings)  # `up.1` is not `up.10`
        found = {layer.name for layer in layers if f"{layer.name}.".startswith(whole)}
        if not found and layers:
            known = {"all", *groups, *(layer.name.split(".")[0] for layer in layers)}
            what = f"{name!r} is no layer of this base model"
            raise Problem(what, where="--adapter_layers", remedy=did_you_mean(name, known))
        chosen |= found
    return [layer for layer in layers if layer.name in chosen]
