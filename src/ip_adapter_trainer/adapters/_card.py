"""What a trained adapter is: the description that lies beside its weights as `adapter.json`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from ip_adapter_trainer.core.errors import Problem, did_you_mean
from ip_adapter_trainer.core.settings import Part

FORMAT_VERSION = 1


class AdapterCard(Part):
    """Everything needed to build the model around the weights again."""

    format_version: int = FORMAT_VERSION
    variant: str
    variant_config: dict[str, Any]
    family: str
    num_tokens: int
    pretrained_model_name_or_path: str
    image_encoder_path: str
    feature: str  # image_embeds or penultimate
    feature_dim: int
    context_dim: int
    step: int
    images_seen: int
    package_version: str

    def to_json(self) -> str:
        """The card as text for `adapter.json`."""
        return json.dumps(self.model_dump(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> AdapterCard:
        """Reads `adapter.json`.

        Raises:
            Problem: no JSON, unknown or missing keys, or a format newer than this package knows.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise Problem(f"the adapter card is no JSON: {error}", where=where) from error
        if not isinstance(content, dict):
            raise Problem("the adapter card is no JSON object", where=where)
        version = content.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            what = f"the adapter card has format {version}, this package knows {FORMAT_VERSION}"
            raise Problem(what, where=where, remedy="upgrade ip_adapter_trainer")
        for key in content.keys() - cls.model_fields.keys():
            raise Problem(f"unknown key {key!r} in the card", where=where, remedy=did_you_mean(key, cls.model_fields))
        try:
            return cls(**content)
        except ValidationError as error:
            first = error.errors()[0]
            raise Problem(f"adapter card: {first['loc'][0]}: {first['msg']}", where=where) from error
