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
STALL_NOISE = "stall of a checkpoint, width of the rounds' middle half [s]"
ROWS, WAIT = "a row fed to the step, one core [ms]", "wait for data, share of a step"
PREPARE, PARITY = "preparing an image, from its file [s]", "gradient error"
WHOLE, START = "a whole run by the required flags [s]", "from the command to the first step [s]"
TECHNIQUE, TECHNIQUE_PEAK = "time per trained image without / with", "peak memory [GB] without / with"
EXACT = (FLOPS, ROWS, PARITY)  # that count without parity: counted, a test of its own, parity itself
PRECISIONS = ("fp32", "bf16")  # of ours whose gradients are compared


@dataclass(frozen=True)
class Target:
    """What a row must show; those that fit its name and device count."""

    kind: str
    device: str
    parts: tuple[str, ...]  # all of them in the row's name
    of: str  # ratio, or ours
    bound: float
    at_least: bool = True

    def fits(self, row: Row) -> bool:
        """Whether it was made for a row."""
        names = row.name.startswith(f"{self.kind}, ") and all(part in row.name for part in self.parts)
        return names and self.device in ("any", row.device)

    def is_met(self, row: Row) -> bool | None:
        """By a row; None: it has no such figure."""
        value: float | None = getattr(row, self.of)
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.of} {'>=' if self.at_least else '<='} {self.bound:.4g}"


TARGETS = (
    Target(TIME, "cpu", ("sd15", "published fp32"), "ratio", 7.5),
    Target(TIME, "cpu", ("sd15", "published bf16"), "ratio", 4.0),
    Target(TIME, "cuda", ("sd15", "batch 1,"), "ratio", 6.0),
    Target(TIME, "cuda", ("sd15", "batch 8,"), "ratio", 3.0),
    Target(TIME, "cuda", ("sdxl", "published bf16"), "ratio", 2.7),
    Target(FLOPS, "any", ("sd15 512 px",), "ratio", 1.85),
    Target(FLOPS, "any", ("sdxl",), "ratio", 1.41),
    Target(ROOF, "cpu", ("sd15",), "ours", 0.45),
    Target(ROOF, "cuda", ("sd",), "ours", 0.43),
    Target(PEAK, "any", ("sd15",), "ratio", 2.0),
    Target(PEAK, "any", ("sdxl",), "ratio", 1.8),
    Target(BYTES, "any", ("sd15",), "ratio", 13.0),
    Target(ROWS, "any", (), "ratio", 300.0),
    Target(WAIT, "cuda", ("sd",), "ours", 0.01, at_least=False),
    Target(STALL, "any", ("sd",), "ours", 0.6, at_least=False),
    Target(PREPARE, "cpu", ("sd15",), "ratio", 1.7),
    Target(PREPARE, "cuda", ("sd15",), "ratio", 2.0),
    Target(PREPARE, "cuda", ("sdxl",), "ratio", 3.0),
    Target(WHOLE, "any", ("sd15", "ours bf16"), "ratio", 3.0),
    Target(WHOLE, "any", ("sd15", "ours fp32"), "ratio", 1.3),
    Target(START, "any", ("sd15",), "ratio", 1.5),
    Target(PARITY, "any", (", fp32",), "ours", 1e-5, at_least=False),
    Target(PARITY, "any", (", bf16",), "ours", 2e-2, at_least=False),
    Target(PARITY, "any", (", bf16",), "ratio", 1 / 1.2),  # never over 1.2 times the published error
)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what, at which size, against which published precision.
        device: cpu or cuda.
        published: the published side's figure; None: it is the reference itself, has no such figure, or failed.
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
    def targets(self) -> list[Target]:
        """The targets it was made for."""
        return [target for target in TARGETS if target.fits(self)]

    @property
    def is_met(self) -> bool | None:
        """Whether all its targets are met, parity left aside; None: there are none, or a figure is missing."""
        met = [target.is_met(self) for target in self.targets]
        return all(met) if met and None not in met else None

    @property
    def setting(self) -> str:
        """Size, side and batch, of a row that has targets."""
        return self.name.removeprefix(f"{self.targets[0].kind}, ").split(", ")[0]


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """Whether a row's targets are met, among all rows: a speed counts only beside gradients that are right."""
    if row.is_met is None:
        return ""
    if row.name.startswith(EXACT):
        return "yes" if row.is_met else "no"
    known = {other.name: other.is_met for other in rows}
    parity = [known.get(f"{PARITY}, {row.setting}, {precision}") for precision in PRECISIONS]
    if row.parity is None or None in parity:
        return "no parity"
    return "yes" if row.is_met and all(parity) else "no"


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "" if value is None else form.format(value)


def _line(row: Row, rows: Sequence[Row]) -> str:
    cells = [
        row.name, row.device, _number(row.published), _number(row.ours), _number(row.ratio, "{:.2f}"),
        _number(row.spread, "{:.1%}"), _number(row.parity, "{:.1e}"), "; ".join(map(str, row.targets)),
        verdict(row, rows),
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
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(_line(row, rows) for row in rows)]
    text = "\n".join(["# The published recipe's step beside ours", "", *(f"- {f}" for f in facts), "", *table, ""])
    (folder / "ratios.md").write_text(text, encoding="utf-8")
