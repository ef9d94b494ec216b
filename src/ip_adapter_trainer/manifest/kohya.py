"""Rows of kohya's lists, `meta_cap.json` and `meta_lat.json`: what is known of each image, by its name or stem."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.images.decode import SUFFIXES as IMAGE_SUFFIXES
from ip_adapter_trainer.manifest.rows import Columns
from ip_adapter_trainer.storage.files import safe_join

_TEXTS = ("caption", "tags")  # joined in this order, as kohya's trainers do


class Listed:
    """Turns one key of such a list and its value into the fields of a row."""

    def __init__(self, root: Path, columns: Columns) -> None:
        self._root, self._columns = root.resolve(), columns
        self._names: dict[str, dict[str, str]] = {}

    def fields(self, key: str, value: Any) -> Any:
        """Return the fields of a row; a value that is no object is returned as it is, and no row."""
        if not isinstance(value, dict):
            return value
        fields = {self._columns.image: self._file(key)} | value
        texts = [value[name] for name in _TEXTS if value.get(name)]
        if self._columns.text not in value and texts and all(isinstance(text, str) for text in texts):
            fields = {name: field for name, field in fields.items() if name not in _TEXTS}
            fields[self._columns.text] = ", ".join(texts)
        return fields

    def _file(self, key: str) -> str:
        """Return the picture's name; a key that has no suffix of a picture is looked up among the pictures' stems."""
        name = PurePosixPath(key)
        if name.suffix.lower() in IMAGE_SUFFIXES:
            return key
        place = str(name.parent)
        if place not in self._names:
            self._names[place] = self._images(place)
        found = self._names[place].get(name.name)
        return str(name.with_name(found)) if found else key

    def _images(self, place: str) -> dict[str, str]:
        try:
            paths = sorted(safe_join(self._root, place).iterdir(), reverse=True)  # of one stem, the first remains
        except (OSError, Problem):
            return {}
        return {path.stem: path.name for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
