"""`ip-adapter prepare`: from rows to a prepared set, on any number of processes, going on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ip_adapter_trainer.adapters import IMAGE, VARIANTS
from ip_adapter_trainer.cache.config import CutConfig
from ip_adapter_trainer.cache.prepared import PreparedSet
from ip_adapter_trainer.cache.spec import CacheSpec, random_cuts
from ip_adapter_trainer.core.errors import Fault, Problem, Stopped, StorageProblem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.values import Need
from ip_adapter_trainer.encoders import ImageEncoder
from ip_adapter_trainer.families import Codec
from ip_adapter_trainer.images.decode import ImageFault
from ip_adapter_trainer.loading.encoder import load_encoders
from ip_adapter_trainer.loading.frozen import load_base_of
from ip_adapter_trainer.manifest.faults import FILE_NAME, FaultLog
from ip_adapter_trainer.manifest.images import ImageFiles, fault_of
from ip_adapter_trainer.manifest.manifest import Manifest, read_alike
from ip_adapter_trainer.prepare.config import PrepareConfig
from ip_adapter_trainer.prepare.cut import warn_of_cut_captions
from ip_adapter_trainer.prepare.encode import Encoding, encode_captions, encode_with, missing_captions
from ip_adapter_trainer.prepare.spec import cache_spec
from ip_adapter_trainer.prepare.work import MissingReader, missing, read_all, share_of
from ip_adapter_trainer.runtime.launch import Runtime, claimed, start
from ip_adapter_trainer.runtime.progress import Progress
from ip_adapter_trainer.runtime.signals import StopSignal
from ip_adapter_trainer.runtime.stopping import Poll, Stopping
from ip_adapter_trainer.storage.staging import sweep

_FLAG = "--prepared_dir"


@dataclass(frozen=True)
class PrepareReport:
    """The counts and faults of a run of `prepare`, over all processes."""

    folder: Path
    images: int = 0  # that the rows name
    read: int = 0  # of them, now; once for each image encoder
    encoded: int = 0  # passes of one of them through an encoder
    captions: int = 0  # encoded now
    faulty_rows: int = 0

    def followed_by(self, later: PrepareReport) -> PrepareReport:
        """Return the sum of this report and a later one for another image encoder, whose faults are the same ones."""
        done = {name: getattr(self, name) + getattr(later, name) for name in ("read", "encoded", "captions")}
        return replace(later, **done)

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.images} pictures, {self.read} read and {self.encoded} encodings made now, "
            f"{self.captions} captions encoded now, {self.faulty_rows} faulty rows"
        )


def prepare(config: PrepareConfig) -> PrepareReport:
    """Encode what the rows need and the set lacks.

    Raises:
        Problem: settings under which nothing can be encoded beforehand, or models that do not load.
        DataProblem: more rows are faulty than the settings allow.
        StorageProblem: not enough room.
        Stopped: asked to stop, after what was encoded has been written.
    """
    demand_preparable(config)
    folder = Path(config.prepared_dir)
    with (
        StopSignal("nothing was encoded yet; run the same command again") as signal,
        start(
            mixed_precision=config.mixed_precision,
            local_rank=config.local_rank,
            output_dir=str(folder),
            logging_dir="",
        ) as runtime,
    ):
        manifest = read_alike(config, runtime)
        parts = ("autoencoder", "text") if config.prepare_text else ("autoencoder",)
        with runtime.agreed():
            codec = load_base_of(config, runtime.dtype, runtime.device, parts=parts).codec
        if config.prepare_text and runtime.is_main:
            warn_of_cut_captions(manifest, codec.tokenizers)
        needs = VARIANTS[config.variant].needs
        report, stopping = PrepareReport(folder), Stopping(signal, runtime)
        for path in dict.fromkeys((config.image_encoder_path, *config.more_image_encoders)):
            with runtime.agreed():
                encoders = load_encoders(needs, path, config, config, dtype=runtime.dtype, device=runtime.device)
            every = [Need(IMAGE, feature) for feature in encoders[IMAGE].features]
            wanted = [*every, *(need for need in needs if need.role != IMAGE)] if config.both_features else needs
            spec = cache_spec(config, codec, encoders, wanted, text=config.prepare_text)
            job = Job(config, runtime, manifest, spec, folder)
            report = report.followed_by(job.run(codec, encoders, config.encode_batch_size, stopping))
        return report


def demand_preparable(config: CutConfig) -> None:
    """Refuse settings that cut each image otherwise every time.

    Raises:
        Problem: such a setting is on.
    """
    anew = random_cuts(config)
    if anew:
        what = f"{' and '.join(anew)} cut each image otherwise every time, so it cannot be encoded beforehand"
        raise Problem(what, where=" ".join(anew), remedy="leave out these flags, or train from the pictures")


class Job:
    """One filling of one set: first what is missing is counted, then it is made.

    Attributes:
        need_bytes: what is missing takes at most, over all processes.
        free_bytes: room on the disk of the set, as the first process sees it.
    """

    def __init__(self, config: CutConfig, runtime: Runtime, manifest: Manifest, spec: CacheSpec, folder: Path) -> None:
        workers = runtime.data_workers(config.dataloader_num_workers)
        self.config = config.model_copy(update={"dataloader_num_workers": workers})
        self.runtime, self.manifest, self.spec, self.folder = runtime, manifest, spec, folder
        self.images = ImageFiles.of(manifest.root, config)
        self.prepared = PreparedSet(folder, spec, self.images)
        self.items = share_of(manifest, spec, runtime.rank, runtime.world)
        self.left, need_bytes = missing(self.items, self.prepared, self.images)
        self.captions = missing_captions(manifest, self.prepared, runtime.rank, runtime.world)
        need_bytes += len(self.captions) * sum(kind.row_bytes for kind in (spec.text.tables if spec.text else ()))
        self.need_bytes = runtime.total(need_bytes)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free if runtime.is_main else 0
        self.free_bytes = runtime.total(free_bytes)  # machines may differ, what is decided by it must not

    @property
    def fits(self) -> bool:
        """True where the disk has room for what is missing."""
        return self.need_bytes * 1.02 + 2**20 < self.free_bytes or not self.need_bytes

    def run(
        self, codec: Codec, encoders: Mapping[str, ImageEncoder], batch_images: int, stopping: Stopping
    ) -> PrepareReport:
        """Make what is missing; see `prepare`."""
        room = f"{_size(self.need_bytes)} needed at most, {_size(self.free_bytes)} free"
        read = self.runtime.total(len(self.left))
        say(f"prepared set {self.folder}: {read} pictures to read, {room}")
        remedy = f"make room, or give {_FLAG}"
        small = StorageProblem(f"the disk is too small: {room}", where=str(self.folder), remedy=remedy)
        self.runtime.agree(None if self.fits else small)
        with claimed(self.folder, self.runtime, _FLAG):
            self._begin()
            encoding = Encoding(self.folder, encode_with(codec, encoders), batch_images)
            preprocess = {role: encoder.preprocess for role, encoder in encoders.items()}
            reader = MissingReader(self.prepared, self.images, self.config, preprocess)

            def fill(poll: Poll) -> None:
                """Do this process's share."""
                try:
                    self._fill(encoding, reader, poll)
                    encode_captions(self.captions, codec, encoding, self.prepared, batch_images, poll)
                finally:
                    encoding.seal()

            with stopping.noted(), self._told_if_stopped(encoding):
                stopping.together(fill)
            log = self._log()
            log.demand_limit()
        images, encoded = self.runtime.total(len(self.items)), self.runtime.total(encoding.encoded)
        captions = self.runtime.total(len(self.captions))
        return PrepareReport(self.folder, images, read, encoded, captions, log.faulty_rows)

    @contextmanager
    def _told_if_stopped(self, encoding: Encoding) -> Iterator[None]:
        """Tell what a stop, which comes to all processes alike, leaves behind."""
        try:
            yield
        except Stopped:
            kept = self.runtime.total(encoding.encoded)
            say(f"stopped: {kept} encodings of pictures are made and kept; run the same command again to go on")
            raise

    def _begin(self) -> None:
        """Remove what a killed run left; faults are met again, since faulty images are always tried again."""
        if self.runtime.is_main:
            for kind in self.spec.tables:
                sweep(self.folder / kind.folder)
            (self.folder / FILE_NAME).unlink(missing_ok=True)
        self.runtime.barrier()

    def _log(self) -> FaultLog:
        return FaultLog(self.folder, self.manifest.entries, self.config.max_fault_rate)

    def _fill(self, encoding: Encoding, reader: MissingReader, poll: Poll) -> None:
        log, faulty = self._log(), dict[str, ImageFault]()
        if self.runtime.is_main:
            log.add(self.manifest.faults)
        unit = "picture" if self.runtime.world == 1 else f"process 1 of {self.runtime.world}: picture"
        with Progress(len(self.left), unit, shown=self.runtime.is_main) as progress:
            for read in read_all(self.left, reader, self.config, self.manifest.where, poll):
                poll()
                if read.record is not None:
                    encoding.note(read.item.name, read.record)
                if read.fault is not None:
                    faulty[read.item.name] = read.fault
                    log.add([fault_of(read.fault, self.manifest.where(read.item.row))])
                for views, pixels in read.pixels:
                    encoding.take(views, pixels)
                progress.update(1)
        encoding.finish()
        log.add(self._faults_of_rows(faulty))

    def _faults_of_rows(self, faulty: dict[str, ImageFault]) -> list[Fault]:
        """Return the fault of a faulty image for every row that names it."""
        return [
            fault_of(faulty[name], self.manifest.where(number))
            for number, row in enumerate(self.manifest.rows if faulty else ())
            for name, _ in self.spec.uses(row)
            if name in faulty
        ]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
