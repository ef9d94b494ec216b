"""`ip-adapter check`: reads every row and image, beside a base model also captions, and tells what is wrong."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from tqdm import tqdm

from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.core.values import Size
from ip_adapter_trainer.feed.bucketing import assign_buckets, first_without_stand_in
from ip_adapter_trainer.images.decode import DecodedImage, ImageFault, Note
from ip_adapter_trainer.loading.base import load_tokenizers
from ip_adapter_trainer.loading.config import BaseConfig, FoundConfig, part_of
from ip_adapter_trainer.manifest.faults import allowed_rows, excess
from ip_adapter_trainer.manifest.hold_out import hold_out
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of, map_rows
from ip_adapter_trainer.manifest.manifest import Manifest, read_manifest
from ip_adapter_trainer.prepare.check_config import CheckConfig, RowsCheckConfig
from ip_adapter_trainer.prepare.cut import cut_captions

_SHAPES = ("under 1:2", "1:2 to 2:3", "2:3 to 1:1", "1:1", "1:1 to 3:2", "3:2 to 2:1", "over 2:1")  # width : height
_LIMITS = (0.5, 2 / 3, 0.99, 1.01, 1.5, 2.0)


@dataclass(frozen=True)
class Seen:
    """The findings in one row."""

    size_px: Size | None  # height, width of the target; None if it could not be read
    notes: tuple[Note, ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """The findings in all rows."""

    manifest: Manifest
    faults: tuple[Fault, ...]  # of the manifest, then of the pictures in the order of the rows
    by_note: Counter[str]  # rows with each thing worth knowing that is no fault
    sides_px: array[int]  # height and width of each readable target in turn
    config: RowsCheckConfig
    stuck_at: str = ""  # a row that cannot be read, nor can those that would stand in for it
    captions: str = ""  # what was found of their lengths, if they were looked at

    def __str__(self) -> str:
        return render(self)

    @property
    def faulty_rows(self) -> int:
        """Distinct rows with a fault."""
        return len({fault.where for fault in self.faults})

    @property
    def exit_code(self) -> int:
        """0, or 3 if training would stop for the faults."""
        return 3 if self.stop else 0

    @property
    def stop(self) -> str:
        """The reason for which training would stop; empty if it would not."""
        stuck = f"{self.stuck_at} cannot be read, nor any row that would be taken in its place"
        many = excess(self.faulty_rows, self.manifest.entries, self.config.max_fault_rate)
        return many or (stuck if self.stuck_at else "")

    @property
    def by_kind(self) -> Counter[str]:
        """Faults of each kind."""
        return Counter(fault.kind for fault in self.faults)

    @property
    def sizes_px(self) -> list[Size]:
        """Height and width of each readable target."""
        return list(zip(self.sides_px[::2], self.sides_px[1::2], strict=True))

    @property
    def by_shape(self) -> dict[str, int]:
        """Readable targets by width over height, in bands."""
        bands = Counter(bisect_right(_LIMITS, width / height) for height, width in self.sizes_px)
        return {shape: bands[band] for band, shape in enumerate(_SHAPES)}


def check_rows(config: RowsCheckConfig) -> CheckReport:
    """Read every row and image, with a progress bar where somebody watches.

    Raises:
        Problem: the manifest cannot be read at all.
    """
    manifest = read_manifest(config)
    see = partial(_see, manifest, ImageFiles.of(manifest.root, config))
    faults, faulty, notes, sides_px = list(manifest.faults), list[int](), Counter[str](), array("i")
    rows = map_rows(see, range(len(manifest.rows)), manifest, config)
    for number, seen in enumerate(tqdm(rows, total=len(manifest.rows), unit="images", disable=None)):
        faults += seen.faults
        faulty += [number] if seen.faults else []
        notes.update(seen.notes)
        sides_px.extend(seen.size_px or ())
    stuck = None
    if faulty:
        held_out = hold_out(manifest.rows, config.validation_share, manifest.root)
        stuck = first_without_stand_in(assign_buckets(manifest, config).only(~held_out).bucket_of_row, faulty)
    stuck_at = "" if stuck is None else manifest.where(stuck)
    return CheckReport(manifest, tuple(faults), notes, sides_px, config, stuck_at)


def _see(manifest: Manifest, images: ImageFiles, number: int) -> Seen:
    row, where = manifest.rows[number], manifest.where(number)
    target, faults = _try(images, row.image_file, where)
    prompt = None
    if row.prompt_image_file is not None:
        prompt, more = _try(images, row.prompt_image_file, where)
        faults += tuple(replace(f, what=f"prompt image: {f.what}") for f in more)
    notes = {note for image in (target, prompt) if image is not None for note in image.notes}
    size_px = None if target is None else (target.image.height, target.image.width)
    return Seen(size_px, tuple(sorted(notes)), faults)


def _try(images: ImageFiles, name: str, where: str) -> tuple[DecodedImage | None, tuple[Fault, ...]]:
    try:
        return images.read(name), ()
    except ImageFault as error:
        return None, (fault_of(error, where),)


def check(config: CheckConfig) -> CheckReport:
    """Read every row and picture, and count the captions that the base model cuts if one is named.

    Raises:
        Problem: the manifest or the base model cannot be read at all.
    """
    name = config.pretrained_model_name_or_path
    if name is None:
        if given := [f"--{name}" for name in FoundConfig.model_fields if getattr(config, name) is not None]:
            what = "no base model is named that these settings are for"
            remedy = "give --pretrained_model_name_or_path too, or leave them out"
            raise Problem(what, where=" ".join(given), remedy=remedy)
        return check_rows(config)
    tokenizers = load_tokenizers(name, part_of(config, BaseConfig))  # before hours of reading pictures
    report = check_rows(config)
    return replace(report, captions=str(cut_captions(report.manifest, tokenizers)))


def render(report: CheckReport) -> str:
    """Render the report as plain text: the first faults one by one, counts, the verdict on the last line."""
    shown = [f"{fault.kind:>16}  {fault}" for fault in report.faults[: report.config.show_faults]]
    hidden, unread = len(report.faults) - len(shown), report.manifest.unread_columns
    parts = [
        [*shown, f"{'':>16}  and {hidden} more"] if hidden else shown,
        _table("faults by kind", dict(report.by_kind.most_common())),
        _table("noted, no faults", dict(report.by_note.most_common())),
        _table("width to height", report.by_shape) if report.sizes_px else [],
        _sizes(report.sizes_px, report.config.resolution),
        _table("noticed in the folder", report.manifest.noticed.named()),
        [f"columns that nothing reads: {', '.join(unread)}"] if unread else [],
        [report.captions] if report.captions else [],
        [_verdict(report)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _table(title: str, counts: dict[str, int]) -> list[str]:
    return [title, *(f"{count:>16}  {name}" for name, count in counts.items())] if counts else []


def _sizes(sizes_px: list[Size], resolution_px: int) -> list[str]:
    if not sizes_px:
        return []
    shorter = sorted(map(min, sizes_px))
    lines = [f"shorter side: {shorter[0]} px at least, {median(shorter):g} in the middle, {shorter[-1]} at most"]
    if resolution_px:
        small = bisect_left(shorter, resolution_px)
        lines.append(f"{small} of {len(shorter)} pictures have a side under {resolution_px} px and are enlarged")
    return lines


def _verdict(report: CheckReport) -> str:
    rows, faulty, rate = report.manifest.entries, report.faulty_rows, report.config.max_fault_rate
    if not faulty:
        return f"clean: {rows} rows, all read" + ("; see what was noticed" if report.manifest.noticed.counts else "")
    if report.stop:
        return f"too many faults: {report.stop}; training would stop"
    limit = f"the limit is {allowed_rows(rows, rate)} (--max_fault_rate {rate:g})"
    return f"usable: {faulty} of {rows} rows are faulty and will be replaced by others; {limit}"
