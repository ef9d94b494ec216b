"""The tensors of a weights file under flat names, whatever its container. Nothing that a file holds is executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ip_adapter_trainer.adapter_files.pickled import demand_table
from ip_adapter_trainer.core.errors import Problem, first_line
from ip_adapter_trainer.storage.files import mistaken

Container = Literal["safetensors", "bin"]
V = TypeVar("V")

_MAX_HEADER_BYTES = 16 * 2**20  # a whole UNet's has 200 KB; one of 100 MB would take a GB to read
_MAX_TENSORS = 100_000  # a whole UNet has 2,600
_MAX_DEPTH = 40  # dots in the name of a table in tables

# Prefixes that data-parallel, compiled and DeepSpeed wrappers put before every name.
_WRAPPERS = re.compile(r"^(?:(?:module|state_dict|_orig_mod)\.)+")
# A published script's checkpoint also holds gigabytes of the frozen UNet.
_FROZEN = re.compile(r"unet\.(?!.*\.processor\.)")


@dataclass(frozen=True)
class RawFile:
    """The content of a weights file. Tables of a .bin are flattened: `t["ip_adapter"]["1.x"]` is `ip_adapter.1.x`."""

    path: Path
    container: Container
    tensors: dict[str, Tensor]  # mapped from the file: nothing is read before it is used
    metadata: dict[str, str]
    frozen: int  # number of a frozen UNet's tensors that were left out


def read_raw(path: Path) -> RawFile:
    """Read a .safetensors file, or any other file as a .bin; a frozen UNet in it is left out.

    Raises:
        Problem: the file is missing, truncated, of another kind, or holds pickled code or an unusable tensor.
    """
    with _legible(path):
        raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    for name, tensor in raw.tensors.items():
        _demand_plain(name, tensor, path)
    return raw


@contextmanager
def _legible(path: Path) -> Iterator[None]:
    """Turn whatever a container's library raises into a `Problem`."""
    where = str(path)
    if not path.is_file():
        raise Problem("there is no such file", where=where, remedy="give an adapter file or a checkpoint")
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        if (known := mistaken(path)) is not None:
            raise Problem(f"the file is {known[0]}", where=where, remedy=known[1]) from error
        if isinstance(error, pickle.UnpicklingError):
            what = "the file holds something else than tensors, and was not opened further"
            raise Problem(what, where=where, remedy="ask its maker for a .safetensors file") from error
        remedy = "copy or download it again"
        raise Problem(f"the file cannot be read: {first_line(error)}", where=where, remedy=remedy) from error


def _read_safetensors(path: Path) -> RawFile:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length:,} bytes")
    with safe_open(path, framework="pt", device="cpu") as opened:
        names = _unique((_bare(name), name) for name in opened.keys())  # noqa: SIM118 (it is no mapping)
        tensors = {bare: opened.get_tensor(name) for bare, name in names.items() if not _FROZEN.match(bare)}
        return RawFile(path, "safetensors", tensors, dict(opened.metadata() or {}), len(names) - len(tensors))


def _read_bin(path: Path) -> RawFile:
    mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are no zip archives, and are read whole
    demand_table(path, mapped)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not tables of tensors")
    named = _unique(_flatten(content, set()))
    tensors = {name: tensor for name, tensor in named.items() if not _FROZEN.match(name)}
    return RawFile(path, "bin", tensors, {}, len(named) - len(tensors))


def _flatten(content: Mapping[str, Any], seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors only: step counts and configs belong to no adapter. Shared tables could stand for billions."""
    if id(content) in seen or prefix.count(".") > _MAX_DEPTH:
        raise ValueError("its tables are shared or nested too deeply")
    seen.add(id(content))
    for key, value in content.items():
        name = _bare(f"{prefix}{key}")
        if isinstance(value, Mapping):
            yield from _flatten(value, seen, f"{name}." if name else "")
        elif isinstance(value, Tensor):
            yield name, value


def _unique(named: Iterable[tuple[str, V]]) -> dict[str, V]:
    """Return a dict of the pairs; raise a ValueError if a name comes twice or there are too many."""
    table: dict[str, V] = {}
    for name, value in named:
        if name in table:
            raise ValueError(f"{name} is in it twice")
        if len(table) >= _MAX_TENSORS:
            raise ValueError(f"it holds more than {_MAX_TENSORS:,} tensors")
        table[name] = value
    return table


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _demand_plain(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse unprintable names, and tensors that a pickle can claim without holding them: more elements than bytes."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    held = plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    if not held or not name.isprintable():
        raise Problem(f"{name!r} is no plain tensor", where=str(path), remedy="ask its maker for a .safetensors file")
