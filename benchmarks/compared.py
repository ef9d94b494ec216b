"""What is measured, one setting after the other, as rows of the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks import data_rate, limits, measure, report, whole_run
from benchmarks.aside import Failed, aside
from benchmarks.limits import Flops
from benchmarks.measure import Measured, Schedule
from benchmarks.our_step import TECHNIQUES, Settings
from benchmarks.pictures import Files, write_pictures
from benchmarks.report import Row
from benchmarks.worker import Contender
from ip_adapter_trainer.runtime.precision import usual

NAMES = {"no": "fp32", "bf16": "bf16"}
PUBLISHED = {"cpu": ("no", "bf16"), "cuda": ("bf16",)}  # precisions of the published step that are timed
PICTURES = {"cpu": (8, 0), "cuda": (64, 8)}  # made ready in a round, and the processes that read them, on both sides
SAVING = {"cpu": 4, "cuda": 10}  # steps around a checkpoint


@dataclass(frozen=True)
class Setting:
    """One size at one resolution and batch on a device."""

    size: str
    side_px: int
    images: int
    device: str

    @property
    def name(self) -> str:
        """As rows name it."""
        return f"{self.size} {self.side_px} px batch {self.images}"

    def contender(self, side: str, precision: str, settings: Settings | None = None) -> Contender:
        """One side in this setting."""
        return Contender(side, precision, self.size, self.side_px, self.images, self.device, settings or {})


class Bench:
    """One run's device and what it found out so far.

    Attributes:
        missing: what could not be measured, and why.
        roof: FLOP/s that the device reaches, once measured.
    """

    def __init__(self, device: str, rounds: int, scratch: Path) -> None:
        self.device, self.rounds, self.scratch = device, rounds, scratch
        self.missing: list[str] = []
        self.roof: float | None = None
        self._counted: dict[tuple[str, int], tuple[Flops, Flops]] = {}
        self._references: dict[Setting, Path | None] = {}
        self._images: dict[int, Files] = {}

    @property
    def facts(self) -> list[str]:
        """Lines about the device."""
        return [] if self.roof is None else [f"measured roof: {self.roof / 1e9:,.0f} GFLOP/s in bf16"]

    def measure_roof(self) -> Iterator[Row]:
        """No row, but what rows' shares are of."""
        self.roof = aside(limits.roof, self.device)
        yield from ()

    def _count(self, size: str, side_px: int) -> tuple[Flops, Flops]:
        if (size, side_px) not in self._counted:
            self._counted[size, side_px] = aside(limits.count, size, side_px)
        return self._counted[size, side_px]

    def _files(self, side_px: int) -> Files:
        if side_px not in self._images:
            folder, (count, workers) = self.scratch / f"pictures-{side_px}", PICTURES[self.device]
            folder.mkdir()
            self._images[side_px] = Files(write_pictures(folder, side_px, count), count, side_px, workers)
        return self._images[side_px]

    def _schedule(self, setting: Setting) -> Schedule:
        if self.device == "cuda":
            return Schedule(self.rounds, untimed=2, timed=10 if setting.images < 8 else 3)
        return Schedule(self.rounds, untimed=0, timed=5 if setting.size == "tiny" else 1)

    def _compare(self, contenders: Sequence[Contender], schedule: Schedule) -> list[Measured]:
        found = measure.compare(contenders, schedule, self.scratch)
        self.missing += [f"{side.contender.label}: {side.failure}" for side in found if side.failure is not None]
        return found

    def _gradients(self, contender: Contender) -> Path | None:
        try:
            return measure.gradients_only(contender, self.scratch)
        except Failed as error:
            self.missing.append(f"gradients of {contender.label}: {error.reason}")
            return None

    def _reference(self, setting: Setting) -> Path | None:
        """The published gradients in fp32."""
        if setting not in self._references:
            self._references[setting] = self._gradients(setting.contender("published", "no"))
        return self._references[setting]

    def flops(self, size: str, side_px: int) -> Iterator[Row]:
        """The counted row of a size."""
        theirs, ours = self._count(size, side_px)
        name = f"{report.FLOPS}, {size} {side_px} px"
        ratio = theirs.total / ours.total
        yield Row(name, self.device, theirs.total / 1e9, ours.total / 1e9, ratio, 0.0, None)

    def rows(self) -> Iterator[Row]:
        """The row of the data path: from pictures as they are read at each step, beside a prepared set."""
        pairs = aside(data_rate.rates, self.rounds, self.scratch)
        raw, prepared = ([1000 / pair[side] for pair in pairs] for side in (0, 1))
        yield from self._timed(f"{report.ROWS}, sd15 512 px", raw, prepared, None)

    def setting(self, setting: Setting, *, is_first: bool) -> Iterator[Row]:
        """All rows of one setting; a checkpoint is the same at every batch, so at a size's first setting alone."""
        precisions = PUBLISHED[self.device]
        for precision in precisions:
            is_last = precision == precisions[-1]
            saving = SAVING[self.device] if is_first and is_last else 0
            schedule = replace(self._schedule(setting), files=self._files(setting.side_px), saving=saving)
            pair = setting.contender("published", precision), setting.contender("ours", "bf16")
            theirs, ours = self._compare(pair, schedule)
            if precision == "no":
                self._references[setting] = theirs.gradients
            parity = _difference(ours.gradients, self._reference(setting))
            yield from self._rows(setting, theirs, ours, parity)
            if is_last:
                yield from self._once(f"{report.WAIT}, {setting.name}", (None, _median(ours.waited)), parity)
                yield from self._parity(setting, theirs, parity)

    def _rows(self, setting: Setting, theirs: Measured, ours: Measured, parity: float | None) -> Iterator[Row]:
        against = f"{setting.name}, published {NAMES[theirs.contender.precision]}"
        yield from self._timed(f"{report.TIME}, {against}", theirs.train_s, ours.train_s, parity)
        yield from self._timed(f"{report.PREPARE}, {against}", theirs.prepare_s, ours.prepare_s, parity)
        counted = self._count(setting.size, setting.side_px)
        shares = [self._share(*of) for of in zip(counted, (theirs, ours), strict=True)]
        yield from self._once(f"{report.ROOF}, {against}", shares, parity)
        peaks = theirs.peak_bytes, ours.peak_bytes
        yield from self._once(f"{report.PEAK}, {against}", _in_units(1e9, peaks), parity)
        if theirs.save_s or ours.save_s:
            sizes = theirs.save_bytes, ours.save_bytes
            yield from self._once(f"{report.BYTES}, {against}", _in_units(1e6, sizes), parity)
            yield from self._stall(against, theirs, ours, parity)

    def _share(self, counted: Flops, side: Measured) -> float | None:
        """Of the roof."""
        seconds = _median(side.train_s)
        if seconds is None or self.roof is None:
            return None
        return (counted.total - counted.attention) / seconds / self.roof

    def _stall(self, against: str, theirs: Measured, ours: Measured, parity: float | None) -> Iterator[Row]:
        """What a checkpoint costs; where steps take longer without one than with one, it is noise, told beside it."""
        medians = [_median(side.save_s) for side in (theirs, ours)]
        costs = [None if seconds is None else max(seconds, 0.0) for seconds in medians]
        yield from self._once(f"{report.STALL}, {against}", costs, parity)
        widths = [measure.middle_half(side.save_s) if side.save_s else None for side in (theirs, ours)]
        yield Row(f"{report.STALL_NOISE}, {against}", self.device, widths[0], widths[1], None, None, None)

    def _parity(self, setting: Setting, theirs: Measured, error: float | None) -> Iterator[Row]:
        """Gradient errors of both sides in bf16, and of ours in fp32; the published one is the reference."""
        reference = self._reference(setting)
        published = _difference(theirs.gradients, reference)
        yield from self._once(f"{report.PARITY}, {setting.name}, bf16", (published, error), error)
        exact = None if reference is None else self._gradients(setting.contender("ours", "no"))
        error = _difference(exact, reference)
        yield from self._once(f"{report.PARITY}, {setting.name}, fp32", (None, error), error)

    def whole(self, size: str) -> Iterator[Row]:
        """Whole runs of both sides, one round, with the parity of a step in the precision that ours chooses."""
        folder = self.scratch / f"whole-{size}"
        folder.mkdir()
        theirs, ours = whole_run.compared(folder, size, self.device)
        shutil.rmtree(folder)
        setting = Setting(size, whole_run.SIDES_PX[size], whole_run.IMAGES, self.device)
        precision = usual(self.device)
        error = _difference(self._gradients(setting.contender("ours", precision)), self._reference(setting))
        name = f"{setting.name}, {whole_run.PICTURES} pictures x {whole_run.EPOCHS} epochs, ours {NAMES[precision]}"
        yield from self._once(f"{report.WHOLE}, {name}", (theirs.total, ours.total), error)
        yield from self._once(f"{report.START}, {setting.name}", (theirs.start, ours.start), error)

    def technique(self, setting: Setting, technique: str) -> Iterator[Row]:
        """Our step without something and with it, time and memory."""
        pair = [setting.contender("ours", "bf16", settings) for settings in TECHNIQUES[technique]]
        without, used = self._compare(pair, self._schedule(setting))
        parity = _difference(used.gradients, self._reference(setting))
        of = f"{technique}, {setting.name}"
        yield from self._timed(f"{report.TECHNIQUE} {of}", without.train_s, used.train_s, parity)
        peaks = without.peak_bytes, used.peak_bytes
        yield from self._once(f"{report.TECHNIQUE_PEAK} {of}", _in_units(1e9, peaks), parity)

    def largest(self, setting: Setting) -> Iterator[Row]:
        """Each side by itself at the largest batch that it can hold."""
        schedule = replace(self._schedule(setting), largest=True)
        sides = [self._compare([setting.contender(side, "bf16")], schedule)[0] for side in ("published", "ours")]
        most = " and ".join(str(side.images) for side in sides)
        name = f"{report.TIME}, {setting.size} {setting.side_px} px, each at its largest batch ({most})"
        yield from self._once(name, [_median(side.train_s) for side in sides], None)

    def _timed(self, name: str, a: Sequence[float], b: Sequence[float], parity: float | None) -> Iterator[Row]:
        """Figures of rounds; a side that failed has none."""
        if a and len(a) == len(b):
            yield Row(name, self.device, median(a), median(b), *measure.ratio_of(a, b), parity)
        else:
            yield from self._once(name, (_median(a), _median(b)), parity)

    def _once(self, name: str, pair: Sequence[float | None], parity: float | None) -> Iterator[Row]:
        """Both sides' figures, taken once, unless there are none."""
        published, ours = pair
        ratio = published / ours if published is not None and ours else None
        if published is not None or ours is not None:
            yield Row(name, self.device, published, ours, ratio, None, parity)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _in_units(unit: float, values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else value / unit for value in values]


def _difference(gradients: Path | None, reference: Path | None) -> float | None:
    return None if gradients is None or reference is None else measure.difference(gradients, reference)
