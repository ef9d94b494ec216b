"""The ranks of the house: each module or package of `ip_adapter_trainer` imports from lower ranks only.

`tests/test_house.py` holds the imports to this table; `tools/draw_house.py` draws it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "ip_adapter_trainer"
RANKS = {
    "core": 0, "storage": 1, "nn": 1, "diffusion": 1, "runtime": 2, "images": 2, "encoders": 2, "layouts": 3,
    "families": 3, "manifest": 3, "adapters": 4, "cache": 4, "adapter_files": 5, "feed": 5, "model": 5, "card": 6,
    "loading": 6, "evaluate": 7, "export": 7, "inspection": 7, "pocket": 7, "prepare": 7, "train": 8, "config": 9,
    "demo": 10, "cli": 11, "__main__": 12, "__init__": 12,
}  # fmt: skip


def unit(file: Path) -> str:
    """Return the name in `RANKS` to which a file of the package belongs."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Yield the unit of every import of the package in a file, once for each time it is imported."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        yield from (name.split(".")[1] for name in names if name.startswith("ip_adapter_trainer."))
