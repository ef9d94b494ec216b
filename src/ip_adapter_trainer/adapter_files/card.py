"""The adapter card: the description of a trained adapter, beside its weights or in an exported file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.settings import Part
from ip_adapter_trainer.storage.documents import json_of, read_text

FORMAT_VERSION = 3
CARD = "adapter.json"
PACKAGE = "ip_adapter_trainer"
_MAX_BYTES = 2**20  # a card of ours has 600
_TABLES = ("variant_config", "loaded_with", "layout_config", "preprocessing", "no_image")  # JSON in a file's metadata


class AdapterCard(Part):
    """Everything needed to rebuild the model around the weights."""

    variant: str
    variant_config: dict[str, Any]
    family: str
    num_tokens: int
    pretrained_model_name_or_path: str
    image_encoder_path: str
    feature: str  # the first one that the variant reads
    feature_dim: int
    context_dim: int
    step: int | None  # None: converted from a file that does not say
    images_seen: int | None
    package_version: str
    loaded_with: dict[str, Any] = Field(default_factory=dict)  # non-default settings of loading its frozen models
    layout: str = "unet"
    layout_config: dict[str, Any] = Field(default_factory=dict)
    image_encoder: str = "clip"  # its kind
    preprocessing: dict[str, Any] = Field(default_factory=dict)  # of its input images; empty: the usual of its kind
    no_image: dict[str, str] = Field(default_factory=dict)  # by feature, the rule for "no image"; empty: as published

    def _content(self) -> dict[str, Any]:
        """Return everything to write; optional fields at their defaults are left out, as in the first cards."""
        content = self.model_dump()
        added = {name: content.pop(name) for name, field in type(self).model_fields.items() if not field.is_required()}
        told = {
            name: value
            for name, value in added.items()
            if value != type(self).model_fields[name].get_default(call_default_factory=True)
        }
        version = 1 if not told else 2 if told.keys() == {"loaded_with"} else FORMAT_VERSION
        return {"format_version": version, **content, **told}

    def to_json(self) -> str:
        """Return the card as the text of `adapter.json`."""
        return json.dumps(self._content(), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> AdapterCard:
        """Read a card from an `adapter.json` file.

        Raises:
            Problem: the file is unreadable or too large for a card; or see `from_json`.
        """
        try:
            text = read_text(path, _MAX_BYTES)
        except (OSError, ValueError) as error:
            raise _unreadable(str(error), str(path)) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str) -> AdapterCard:
        """Parse the text of an `adapter.json` file; `where` names the file in messages.

        Raises:
            Problem: no JSON object, unknown or missing keys, or a format newer than this package knows.
        """
        try:
            content = json_of(text)
        except ValueError as error:
            raise _unreadable(f"no JSON ({error})", where) from error
        if not isinstance(content, dict):
            raise _unreadable("no JSON object", where)
        _check_version(content.pop("format_version", 1), where)
        for key in content.keys() - cls.model_fields.keys():
            raise Problem(f"unknown key {key!r} in the card", where=where, remedy=did_you_mean(key, cls.model_fields))
        return cls._of(content, where)

    def to_metadata(self) -> dict[str, str]:
        """Return the card as strings for a .safetensors header; unknown values (None) are left out."""
        fields = {key: value for key, value in self._content().items() if value is not None}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
        return {"package": PACKAGE, **texts}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> AdapterCard | None:
        """Return the card in a header's strings; None if another program wrote them. Unknown keys are ignored.

        Raises:
            Problem: missing entries, or a format newer than this package knows.
        """
        if metadata.get("package") != PACKAGE:
            return None
        numbers = {"step": None, "images_seen": None}
        content = numbers | {key: metadata[key] for key in cls.model_fields if key in metadata}
        _check_version(metadata.get("format_version", "1"), where)
        for name in _TABLES:
            try:
                content[name] = json_of(content.get(name) or "{}")
            except ValueError as error:
                raise _unreadable(f"{name} is no JSON ({error})", where) from error
        return cls._of(content, where)

    @classmethod
    def _of(cls, content: Mapping[str, Any], where: str) -> AdapterCard:
        try:
            return cls(**content)
        except ValidationError as error:
            first = error.errors()[0]
            raise _unreadable(f"{first['loc'][0]}: {first['msg']}", where) from error


def _check_version(version: object, where: str) -> None:
    digits = str(version)
    if digits.isdecimal() and (len(digits) > 9 or int(digits) > FORMAT_VERSION):
        what = f"the adapter card has format {digits[:20]}, this package knows {FORMAT_VERSION}"
        raise Problem(what, where=where, remedy="upgrade ip_adapter_trainer")


def _unreadable(why: str, where: str) -> Problem:
    remedy = f"restore the {CARD} saved with the weights, or remove it and name base model and image encoder by flags"
    return Problem(f"the adapter card cannot be read: {why}", where=where, remedy=remedy)
