"""Losses and exported weights of every family and variant are those of `golden.json`.

They are written anew only for a change that is meant to change what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ip_adapter_trainer.adapter_files import read_adapter
from ip_adapter_trainer.export import ExportConfig, export
from tests import tiny

GOLDEN = Path(__file__).with_suffix("").with_name("golden.json")
VARIANTS = ("base", "plus", "full")
# Sums are added in another order on other CPUs.
TOLERANCE = 2e-4


def measure(run: Callable[..., Path], folder: Path, kind: str, variant: str) -> dict[str, Any]:
    """Losses of four steps, and the norm of each table of the exported adapter."""
    output = run(folder / "run", base=kind, variant=variant, snr_gamma=5.0, optimizer="adamw")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    export(ExportConfig(source=str(output), output=str(folder / "adapter.safetensors"), dtype="fp32"))
    tables = read_adapter(folder / "adapter.safetensors").tables
    norms = {name: sum(float(t.double().pow(2).sum()) for t in table.values()) ** 0.5 for name, table in tables.items()}
    losses = [row["loss"] for row in rows if "lr" in row]
    card = json.loads((output / "checkpoint-4" / "adapter.json").read_text())
    assert (card["variant"], card["step"], card["images_seen"]) == (variant, 4, 8)
    return {"losses": losses, "validation": rows[-1]["training_rows/loss"], "norms": norms}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", tiny.BASES)
def test_losses_and_exports_are_the_golden_ones(
    run: Callable[..., Path], tmp_path: Path, kind: str, variant: str
) -> None:
    found, golden = measure(run, tmp_path, kind, variant), json.loads(GOLDEN.read_text())[f"{kind} {variant}"]
    for name in ("losses", "validation", "norms"):
        assert found[name] == pytest.approx(golden[name], rel=TOLERANCE), name
