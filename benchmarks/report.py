"""What was measured as rows, as JSON and as a Markdown table, each beside the target it was made for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

TIME, FLOPS, ROOF = "time per trained image [s]", "FLOPs per trained image [G]", "share of the measured roof"
PEAK, BYTES, STALL = "peak memory [GB]", "bytes per checkpoint [MB]", "stall of a checkpoint [s]"
ROWS = "a row fed to the step, one core [ms]"
ENCODE, PARITY, TECHNIQUE = "encoding an image [s]", "gradient error", "time per trained image without / with"


@dataclass(frozen=True)
class Target:
    """What a row must show; the first that fits a row's name and device counts."""

    kind: str
    device: str
    parts: tuple[str, ...]  # all of them in the row's name
    of: str  # ratio, or ours
    bound: float
    at_least: bool = True


TARGETS = (
    Target(TIME, "cpu", ("sd15", "published fp32"), "ratio", 7.5),
    Target(TIME, "cpu", ("sd15", "published bf16"), "ratio", 4.0),
    Target(TIME, "cuda", ("sd15", "batch 1,"), "ratio", 6.0),
    Target(TIME, "cuda", ("sd15", "batch 8,"), "ratio", 3.0),
    Target(TIME, "cuda", ("sdxl",), "ratio", 2.7),
    Target(FLOPS, "any", ("sd15 512 px",), "ratio", 1.85),
    Target(FLOPS, "any", ("sdxl",), "ratio", 1.41),
    Target(ROOF, "cpu", ("sd15",), "ours", 0.45),
    Target(ROOF, "cuda", ("sd",), "ours", 0.43),
    Target(PEAK, "any", ("sd15",), "ratio", 2.0),
    Target(PEAK, "any", ("sdxl",), "ratio", 1.8),
    Target(BYTES, "any", ("sd15",), "ratio", 13.0),
    Target(ROWS, "any", (), "ratio", 300.0),
    Target(STALL, "any", ("sd",), "ours", 0.6, at_least=False),
    Target(ENCODE, "cpu", ("sd15",), "ratio", 1.7),
    Target(ENCODE, "cuda", ("sd15",), "ratio", 2.0),
    Target(ENCODE, "cuda", ("sdxl",), "ratio", 3.0),
    Target(PARITY, "any", (" fp32",), "ours", 1e-5, at_least=False),
    Target(PARITY, "any", ("bf16",), "ours", 2e-2, at_least=False),
)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what, at which size, against which published precision.
        device: cpu or cuda.
        published: the published side's figure; None: it is the reference itself, or did not fit.
        ours: ours.
        ratio: published / ours; of timed figures the median over rounds.
        spread: width of the middle half of the rounds' ratios over their median; 0: counted, None: taken once.
        parity: relative L2 difference of our gradients from the published fp32 ones in the same setting.
    """

    name: str
    device: str
    published: float | None
    ours: float | None
    ratio: float | None
    spread: float | None
    parity: float | None

    @property
    def target(self) -> Target | None:
        """The target it was made for."""
        fits = (t for t in TARGETS if self.name.startswith(t.kind) and t.device in ("any", self.device))
        return next((t for t in fits if all(part in self.name for part in t.parts)), None)

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without target or figure."""
        if self.target is None:
            return None
        value: float | None = getattr(self, self.target.of)
        if value is None:
            return None
        return value >= self.target.bound if self.target.at_least else value <= self.target.bound


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "" if value is None else form.format(value)


def _line(row: Row) -> str:
    target, met = row.target, {True: "yes", False: "no", None: ""}[row.is_met]
    wanted = f"{target.of} {'>=' if target.at_least else '<='} {target.bound:g}" if target else ""
    cells = [
        row.name, row.device, _number(row.published), _number(row.ours), _number(row.ratio, "{:.2f}"),
        _number(row.spread, "{:.1%}"), _number(row.parity, "{:.1e}"), wanted, met,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def machine(device: str) -> str:
    """Processor, cores and versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    parts = [f"{os.cpu_count()} cores of {model}", f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    if device == "cuda":
        import torch

        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def write(rows: Sequence[Row], folder: Path, facts: Sequence[str]) -> None:
    """Writes `ratios.json` and `ratios.md`.

    Args:
        rows: what was measured.
        folder: where to.
        facts: lines about the run: command, machine, roof, what is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratios.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    head = ["what", "device", "published", "ours", "published / ours", "spread", "parity", "target", "met"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(_line, rows)]
    text = "\n".join(["# The published recipe's step beside ours", "", *(f"- {f}" for f in facts), "", *table, ""])
    (folder / "ratios.md").write_text(text, encoding="utf-8")
