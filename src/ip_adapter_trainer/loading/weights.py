"""Strict loading of one frozen module: no weight is missing, made up, left over or of another shape.

diffusers and transformers fill what a file lacks with random numbers, or leave it without storage; both report it
beside the model that they return, and that report is judged here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ip_adapter_trainer.core.errors import Problem, as_load_problem, first_line
from ip_adapter_trainer.core.log import quiet_loading, say, silent_diffusers
from ip_adapter_trainer.storage.documents import read_json, read_text
from ip_adapter_trainer.storage.files import mistaken

STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' and transformers'
_FILE = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.([\w-]+))?\.json)?"
)
_MAX_INDEX_BYTES, _MAX_CONFIG_BYTES = 2**24, 2**20
# Parts of names that wrappers put in: torch.compile, DDP, FSDP, PEFT.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Tensors in the files of a part that nothing reads: tables of positions, scale and bias of CLIP's logits.
SPARE = r"(^|\.)(position_ids|logit_scale|logit_bias)$"
_SHOWN = 3
_REMEDY = "give a folder or hub id with config.json and weights in .safetensors files"


class Weights(NamedTuple):
    """The weight files of one part, in one variant."""

    folder: Path
    variant: str | None
    files: tuple[Path, ...]

    @property
    def where(self) -> str:
        """The file, or the folder of several, for messages."""
        return str(self.files[0] if len(self.files) == 1 else self.folder)


def some(names: Sequence[str], between: str = ", ") -> str:
    """Return the first three names, and how many more there are."""
    more = f"{between}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


def variants_in(names: Iterable[str]) -> set[str | None]:
    """Return the variants of the weight files among names: None for plain ones, `fp16` for `model.fp16.safetensors`.

    >>> sorted(variants_in(["config.json", "model.fp16.safetensors", "model.safetensors"]), key=str)
    [None, 'fp16']
    """
    return {variant for variant, is_weights in map(_variant_of, names) if is_weights}


def _variant_of(name: str) -> tuple[str | None, bool]:
    """Return the variant in a file's name, and whether it is the name of a weights file at all."""
    match = _FILE.fullmatch(name)
    return (match[1] or match[2], True) if match else (None, False)


def choose_variant(variants: set[str | None], asked: str | None, part: str, where: str) -> str | None:
    """Return the variant to load: the one asked for, else the plain one, else fp16, else the one that there is.

    Raises:
        Problem: there are several others and none was asked for; or no weights in .safetensors at all.
    """
    if asked in variants:
        return asked
    names = sorted(str(name) for name in variants)
    if not names:
        what = f"{part} has no weights in .safetensors files"
        remedy = "take a copy that has them, or convert one that you trust: from_pretrained(...).save_pretrained(...)"
        raise Problem(what, where=where, remedy=remedy)
    if None in variants or len(names) == 1:
        return None if None in variants else names[0]
    if "fp16" not in names:
        raise Problem(f"{part} has weights in {', '.join(names)}", where=where, remedy="choose with --weights_variant")
    return "fp16"


def wanted_weights(listed: Iterable[str], folder: str, asked: str | None, part: str, where: str) -> list[str]:
    """Return the weight files of one part, in one variant, among the files of a repository.

    The names listed and the part's folder are relative to the repository; see `choose_variant`.
    """
    inside = [Path(name) for name in listed if Path(name).parent.as_posix() == (folder or ".")]
    variant = choose_variant(variants_in(path.name for path in inside), asked, part, where)
    return [path.as_posix() for path in inside if _variant_of(path.name) == (variant, True)]


def weights_in(folder: Path, asked: str | None, part: str) -> Weights:
    """Return a part's weight files; an absent folder has none.

    Raises:
        Problem: see `choose_variant`; or the files are incomplete, or an index names files elsewhere.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    variant = choose_variant(variants_in(names), asked, part, str(folder))
    infix = f".{variant}" if variant else ""
    for stem in STEMS:
        whole, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
        # Where both are there, each library loads the one that is chosen here.
        if whole.is_file() and (stem == "model" or not index.is_file()):
            return Weights(folder, variant, (whole,))
        if index.is_file():
            return Weights(folder, variant, _shards(index, part))
    what = f"{part} has weights that cannot be used: a link to nothing, or pieces without their index"
    raise Problem(what, where=str(folder), remedy="copy or download the folder again, links followed")


def _shards(index: Path, part: str) -> tuple[Path, ...]:
    try:
        names = sorted(set(read_json(index, _MAX_INDEX_BYTES)["weight_map"].values()))
        files = tuple(index.parent / name for name in names if Path(name).name == name)
        if len(files) != len(names) or not all(file.is_file() for file in files):
            raise ValueError("it names files that are not beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{part} has an index of weights that cannot be used: {first_line(error)}"
        raise Problem(what, where=str(index), remedy="copy or download the folder again") from error
    return files


def load_module(
    kind: Any, weights: Weights, part: str, *, dtype: torch.dtype, spare: str = SPARE, unread: str | None = None
) -> Any:
    """Load one frozen module, and demand that it is whole.

    Args:
        kind: its class, of diffusers or transformers.
        weights: its files, beside its config.json.
        part: its name in messages, as "the base model's unet".
        dtype: of the weights.
        spare: pattern of names in the files that the module may have no place for.
        unread: pattern of the module's weights that nothing reads; those that the files lack are zeros.

    Raises:
        Problem: a weight is missing, left over or of another shape, or there is no such module at all.
    """
    names = names_of(weights, part)
    if any(_unwrapped(name) != name for name in names):
        tensors = {_unwrapped(key): value for file in weights.files for key, value in load_file(file).items()}
        module = load_tensors(
            kind, tensors, weights.folder, part, weights.where, dtype=dtype, spare=spare, unread=unread
        )
        say(f"{part}: its weights' names carry a wrapper's prefix ({names[0]}), which is left out")
        return module
    quiet_loading()
    with silent_diffusers(), as_load_problem(part, weights.where, _REMEDY):
        model, info = kind.from_pretrained(
            str(weights.folder), variant=weights.variant, dtype=dtype, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    return _judged(model, info, part, weights.where, spare, unread)


def load_tensors(
    kind: Any,
    tensors: dict[str, Tensor],
    settings: Path,
    part: str,
    where: str,
    *,
    dtype: torch.dtype,
    spare: str = SPARE,
    unread: str | None = None,
) -> Any:
    """Load one frozen module from tensors [...] in memory, and demand that it is whole; see `load_module`.

    Tensors have the names of the class's own files, and `settings` is the folder with its config.json; `where` says in
    messages where they come from.
    """
    demand_numbers([name for name, tensor in tensors.items() if not tensor.is_floating_point()], part, where)
    quiet_loading()
    with silent_diffusers(), as_load_problem(part, where, _REMEDY):
        if hasattr(kind, "load_config"):  # diffusers
            with init_empty_weights():
                empty = kind.from_config(kind.load_config(str(settings)))
            model, info = _made(empty, tensors)
            model.to(dtype)
        else:
            config = kind.config_class.from_pretrained(str(settings))
            model, info = kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    return _judged(model, info, part, where, spare, unread)


def _made(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a diffusers module with tensors loaded, and the report that its library would give."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    both = [(name, tensor.shape, shapes[name]) for name, tensor in tensors.items() if name in shapes]
    mismatched = [(name, found, own) for name, found, own in both if found != own]
    others = {name: tensor for name, tensor in tensors.items() if name not in {name for name, *_ in mismatched}}
    missing, unexpected = model.load_state_dict(others, strict=False, assign=True)
    return model, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}


@torch.no_grad()
def _judged(model: Any, info: dict[str, Any], part: str, where: str, spare: str, unread: str | None) -> Any:
    """Return a module, frozen; raise a `Problem` if it is not whole. What nothing reads is zeros at every load."""
    lacking = _missing(model, info)
    _judge(model, info, lacking, part, where, spare, unread)
    if lacking:
        say(f"{part} lacks {some(lacking)}, which nothing reads here")
        tensors = dict(_tensors(model))
        for name in lacking:
            tensors[name].zero_()
    return model.eval().requires_grad_(False)


def names_of(weights: Weights, part: str) -> list[str]:
    """Return the names of all weights in the files; those of quantized models are refused.

    Raises:
        Problem: a file is damaged, or holds the codes of a quantized model.
    """
    names: list[str] = []
    for file in weights.files:
        try:
            with safe_open(file, "pt") as opened:
                keys = list(opened.keys())
                dtypes = {key: str(opened.get_slice(key).get_dtype()) for key in keys}
        except (SafetensorError, OSError) as error:
            raise damaged(file, part, error) from error
        coded = [key for key in keys if not dtypes[key].startswith(("F", "BF"))]
        demand_numbers(coded, part, str(file))
        names += keys
    return names


def demand_numbers(coded: Sequence[str], part: str, where: str) -> None:
    """Demand weights that are numbers, but for tables of positions; `coded` names the integer tensors.

    Raises:
        Problem: there are codes of a quantized model.
    """
    codes = [name for name in coded if not re.search(SPARE, name)]
    if codes:
        what = f"{part} is quantized: {some(codes)} {'is' if len(codes) == 1 else 'are'} codes, not numbers"
        raise Problem(what, where=where, remedy="take the model as it was before it was quantized")


def damaged(file: Path, part: str, error: Exception) -> Problem:
    """Return the problem with a weights file whose reader raised an error."""
    if (known := mistaken(file)) is not None:
        return Problem(f"{part} is {known[0]}", where=str(file), remedy=known[1])
    what, remedy = f"cannot load {part}: {first_line(error)}", "the file is damaged: copy or download it again"
    return Problem(what, where=str(file), remedy=remedy)


def is_wrapped(weights: Weights, part: str) -> bool:
    """Return whether weights' names carry a wrapper's prefix, under which other programs do not find them.

    Raises:
        Problem: the files cannot be read.
    """
    return any(_unwrapped(name) != name for name in names_of(weights, part))


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:1] == ["base_model"]:
        parts = parts[2:] if parts[1:2] == ["model"] else parts[1:]
    return ".".join(parts) or name


def _missing(model: nn.Module, info: dict[str, Any]) -> list[str]:
    """Return the weights that the files lack, in the model's order: reported by the library or left without storage."""
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    missing = set(info["missing_keys"])
    return [n for n, t in _tensors(model) if (n in missing or t.is_meta) and n not in mismatched]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _judge(
    model: nn.Module,
    info: dict[str, Any],
    lacking: Sequence[str],
    part: str,
    where: str,
    spare: str,
    unread: str | None,
) -> None:
    """Raise a `Problem` if a module is not whole."""
    total = len(model.state_dict())
    needed = [name for name in lacking if not (unread and re.search(unread, name))]
    if info["mismatched_keys"]:
        told = [f"{n} is {list(found)}, expected {list(own)}" for n, found, own in sorted(info["mismatched_keys"])]
        what = f"{part} has {len(told)} of {total} weights in other shapes than its config.json says"
        what += f": {some(told, '; ')}"
        raise Problem(what, where=where, remedy="take the config.json that belongs to these weights, or another copy")
    if needed:
        what = f"{part} lacks {len(needed)} of {total} weights: {some(needed)}"
        raise Problem(what, where=where, remedy="take another copy, whole: none is made up")
    extra = [name for name in sorted(info["unexpected_keys"]) if not re.search(spare, name)]
    if extra:
        what = f"{part} has {len(extra)} weights that its config.json knows no place for: {some(extra)}"
        raise Problem(what, where=where, remedy="take the config.json that belongs to these weights, or another copy")


def read_config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """Return the content of a part's config.json, or of another settings file.

    Raises:
        Problem: the file is missing or unreadable, or the part is quantized.
    """
    try:
        content = json.loads(read_text(folder / name, _MAX_CONFIG_BYTES))  # diffusers writes -Infinity into some
        if not isinstance(content, dict):
            raise ValueError("no mapping")
    except FileNotFoundError as error:
        remedy = "copy or download the folder again: this file says what its weights are"
        raise Problem(f"{part} has no {name}", where=str(folder / name), remedy=remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        what = f"cannot read the settings of {part}: {first_line(error)}"
        raise Problem(what, where=str(folder / name), remedy="copy or download the folder again") from error
    if content.get("quantization_config"):
        what = f"{part} is quantized, as its settings say"
        raise Problem(what, where=str(folder / name), remedy="take the model as it was before it was quantized")
    return content
