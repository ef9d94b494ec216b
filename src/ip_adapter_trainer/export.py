"""Export of a checkpoint or any other adapter file to a published one, verified before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ip_adapter_trainer.adapter_files import READERS, AdapterFile, check_suffix, read_adapter, refusals, write_adapter
from ip_adapter_trainer.adapters import IMAGE, VARIANTS
from ip_adapter_trainer.card import card_of, package_version
from ip_adapter_trainer.core.errors import Problem, StorageProblem, first_line
from ip_adapter_trainer.core.rng import stream
from ip_adapter_trainer.core.values import Geometry
from ip_adapter_trainer.file_config import ExportConfig
from ip_adapter_trainer.layouts import Probe, Reader
from ip_adapter_trainer.loading.adapter import build_model, load_into, remembered_by
from ip_adapter_trainer.loading.config import loaded_with
from ip_adapter_trainer.model import Model
from ip_adapter_trainer.storage.disk import demand_folder
from ip_adapter_trainer.storage.staging import staged_file, sweep_stages

if TYPE_CHECKING:
    from ip_adapter_trainer.adapter_files import AdapterCard

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 1e-5  # largest difference over largest output, in fp32
PROBE_PX = 128  # side of the image whose latents are denoised: enough for every layer, and done in seconds


@dataclass(frozen=True)
class Exported:
    """A file that was written, reloaded and compared."""

    path: Path
    variant: str
    parameters: int
    dtype: str
    reader: str  # the program that reloaded it
    difference: float  # of the denoiser's output, relative; see `verify`
    refusals: dict[Reader, str]  # why readers other than diffusers cannot take the file
    is_encoder_mended: bool  # other programs then need a mended copy of it

    def __str__(self) -> str:
        size = f"{self.path.stat().st_size / 1e6:.1f} MB"
        lines = [f"{self.path}: {self.variant}, {self.parameters:,} parameters in {self.dtype}, {size}"]
        lines.append(f"reloaded by {self.reader}: differs from the live adapter by {self.difference:.1e} of the output")
        lines += [f"notice: {READERS[reader]} {why}" for reader, why in self.refusals.items()]
        if self.is_encoder_mended:
            lines.append(
                "notice: names of the image encoder's weights carry a wrapper's prefix, for which diffusers and others "
                "fill it with random numbers; give them a copy without it (docs/base_models.md)"
            )
        return "\n".join(lines)


def export(config: ExportConfig) -> Exported:
    """Export as configured. If anything fails, no new file is left, and an existing one stays as it was.

    Raises:
        Problem: the source is unreadable, the output exists, the models do not fit, or the layout's reader refuses the
            file or computes something else with it.
        StorageProblem: the file could not be written.
    """
    out = Path(config.output)
    _check_output(out, config.overwrite)
    file = read_adapter(config.source)
    unreadable = file.variant.refusals(file.shapes).get("diffusers")
    if unreadable and file.layout.reader == READERS["diffusers"]:
        remedy = "such an adapter cannot be used or verified; train one with the default settings"
        raise Problem(f"diffusers {unreadable}", where=str(file.path), remedy=remedy)
    base, encoder = config.pretrained_model_name_or_path, config.image_encoder_path
    model = build_model(file, base, encoder, torch.float32, "cpu", config)
    tables = _rounded(model.adapter.published(), config.dtype)
    model.adapter.load_published(tables, str(file.path))
    card = _card(model, file, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep_stages(out)
        with staged_file(out) as stage:
            write_adapter(stage, tables, card.to_metadata(), model.layout)
            written = _reread(stage, tables)
            difference = verify(model, stage)
    except OSError as error:
        what, remedy = f"the file was not written: {error.strerror or error}", "make room, or choose another --output"
        raise StorageProblem(what, where=str(out), remedy=remedy) from error
    return Exported(
        path=out,
        variant=VARIANTS.name_of(file.variant),
        parameters=sum(tensor.numel() for table in tables.values() for tensor in table.values()),
        dtype=config.dtype,
        reader=model.layout.reader,
        difference=difference,
        refusals=refusals(written),
        is_encoder_mended=model.encoder.is_mended,
    )


def _check_output(out: Path, overwrite: bool) -> None:
    check_suffix(out)
    if out.is_dir() or (out.exists() and not overwrite):
        remedy = "give another name with --output" + ("" if out.is_dir() else ", or --overwrite")
        raise Problem("the output exists", where=str(out), remedy=remedy)
    demand_folder(out.parent)


def _rounded(tables: dict[str, dict[str, Tensor]], dtype: str) -> dict[str, dict[str, Tensor]]:
    """Return the tables in the dtype of the file."""
    rounded = {table: {k: v.to(DTYPES[dtype]) for k, v in tensors.items()} for table, tensors in tables.items()}
    for table, tensors in rounded.items():
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                was_finite = bool(tables[table][name].isfinite().all())
                what = f"{table}.{name} does not fit into {dtype}" if was_finite else f"{table}.{name} is not finite"
                remedy = "export with --dtype fp32" if was_finite else "take an older checkpoint"
                raise Problem(what, remedy=remedy)
    return rounded


def _card(model: Model, file: AdapterFile, config: ExportConfig) -> AdapterCard:
    """Return the source's card, updated for the models verified on; without one, a new card of what is known."""
    base = config.pretrained_model_name_or_path
    how = remembered_by(file, base, config.image_encoder_path) | loaded_with(config)
    if file.card is None:
        assert base is not None, "loading demands it"
        return card_of(model, base=base, step=file.step, images_seen=None, loaded_with=how)
    named = {"image_encoder_path": model.encoder.name, "package_version": package_version(), "loaded_with": how}
    return file.card.model_copy(update=named | ({"pretrained_model_name_or_path": base} if base else {}))


def _reread(stage: Path, tables: dict[str, dict[str, Tensor]]) -> AdapterFile:
    """Read the written file and compare every bit: a denoiser's output would not show a small fault."""
    written = read_adapter(stage)
    for table, tensors in tables.items():
        found = written.tables[table]
        for name, tensor in tensors.items():
            if name not in found or found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor.cpu()):
                what = f"{table}.{name} was not written as it is"
                raise Problem(what, where=str(stage.parent), remedy="check the disk and export again")
    return written


@torch.no_grad()
def verify(model: Model, file: Path) -> float:
    """Load a file with its layout's reader and compare the denoiser's output with the live adapter's.

    One sample has an image and one has none, so what the reader feeds for "no image" is compared as well. The model
    must hold the file's weights; its pipeline is left without an adapter.

    Returns:
        The largest difference, over the largest output.

    Raises:
        Problem: the reader refuses the file, or computes something else with it.
    """
    probe, reader = probe_of(model), model.layout.reader
    with model.attached():
        image = model.project(probe.features, probe.time)
        live = model.predict(probe.noisy, probe.time, probe.text, probe.geometry, image)
    try:
        reloaded = model.layout.verify(model.denoiser, file, probe)
        if reloaded is None:
            reloaded = _reloaded_by_us(model, file, probe)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        if isinstance(error, Problem):
            raise
        what = f"{reader} does not load what was written: {first_line(error)}"
        raise Problem(what, where=str(file.parent), remedy="report this with --debug; no file was left") from error
    difference = float((reloaded - live).abs().max() / live.abs().max())
    if not difference <= TOLERANCE:
        what = f"{reader} computes something else with the file: largest difference {difference:.1e} of the output"
        raise Problem(what, where=str(file.parent), remedy="report this with --debug; no file was left")
    return difference


def probe_of(model: Model) -> Probe:
    """Return inputs of the model's own sizes, the same at every export."""

    def noise(purpose: str, *shape: int) -> Tensor:
        """Return unit normal noise [*shape], from a stream of its own."""
        return torch.from_numpy(stream(0, f"export-{purpose}").standard_normal(shape, dtype="float32"))

    size, sides = (PROBE_PX, PROBE_PX), {role: encoder.side_px for role, encoder in model.encoders.items()}
    prompts = {role: noise("pixels", 1, 3, side, side) for role, side in sides.items()}
    images, nulls = model.features(prompts), model.null(1)
    return Probe(
        noisy=noise("latents", 2, *model.codec.latent_shape(*size)),
        time=torch.tensor([100, 800]),
        text=model.codec.text(["a picture", ""]),
        geometry=[Geometry(size, (0, 0), size)] * 2,
        pixels=prompts[IMAGE],
        features={need: torch.cat([nulls[need], images[need]]) for need in model.variant.needs},
        encoder=model.encoder,
    )


def _reloaded_by_us(model: Model, file: Path, probe: Probe) -> Tensor:
    """Return the denoiser's output [2, C, h, w] with a second adapter that is built from the file."""
    again = Model(model.base, model.encoders, model.architecture)
    load_into(again, read_adapter(file))
    with again.attached():
        image = again.project(probe.features, probe.time)
        return again.predict(probe.noisy, probe.time, probe.text, probe.geometry, image)
