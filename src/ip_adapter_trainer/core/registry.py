"""The one mechanism by which families, variants and encoders are found: by name, from files.

An entry is a class in a module of the registry's own package (one file, one entry), or in a module that an installed
package announces under the entry-point group `ip_adapter_trainer.<kind>`. Configs hold names only; no config value is
ever imported as a path.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from ip_adapter_trainer.core.errors import Problem, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes of one kind.

    Usage: a package's `__init__` makes `VARIANTS = Registry("variants", __name__)`, each file in the package decorates
    its class with `@VARIANTS.register("plus")`, and users call `VARIANTS["plus"]`.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._entries: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that enters a class under `name`; a name is given once."""

        def enter(entry: type[T]) -> type[T]:
            """Enter the class and return it."""
            known = self._entries.get(name)
            if known is not None and known.__module__ != entry.__module__:
                raise Problem(f"{self.kind}: {name!r} is registered twice", where=f"{known} and {entry}")
            self._entries[name] = entry
            return entry

        return enter

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=f"ip_adapter_trainer.{self.kind}"):
            point.load()

    def __getitem__(self, name: str) -> type[T]:
        self._load()
        if name not in self._entries:
            raise Problem(f"unknown name in {self.kind}: {name!r}", remedy=did_you_mean(name, self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def name_of(self, entry: type[T]) -> str:
        """Return the name under which a class is registered."""
        return next(name for name, known in self.items() if known is entry)

    def items(self) -> list[tuple[str, type[T]]]:
        """Return all entries, sorted by name."""
        return [(name, self[name]) for name in self]
