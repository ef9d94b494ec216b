"""Pictures from anywhere: each read right or named for what it is, bombs defused, faulty rows replaced in order."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from faults.checking import check
from faults.corpus.broken_pictures import Broken, broken
from faults.corpus.files import encoded
from faults.corpus.pictures import BACKGROUND, GROUND_FLAG, Sound, sound
from faults.corpus.rows import row
from faults.lab import ROWS, Finding, Lab
from faults.watch import seen
from ip_adapter_trainer.images.decode import ImageFault, decode
from ip_adapter_trainer.images.limits import Limits

BOMB_LIMIT_MB = 50
FLIPS = 1000
_BATCH = 4


def pictures(lab: Lab) -> Iterator[Finding]:
    """Every file of the corpus, by `check`, by `train` and, for its pixels, by the decoder itself."""
    folder = lab.place("pictures")
    listed = _write_files(folder)
    wrong = [f"pixels: {case.what}" for case in listed if isinstance(case, Sound) and not _pixels_are_right(case)]
    checked = check(lab, folder / "rows.jsonl", alpha_background=GROUND_FLAG)
    wrong += _differing("check", listed, {number: [f.kind for f in told] for number, told in checked.faults.items()})
    moving = sum(case.frames > 1 for case in listed if isinstance(case, Sound))
    wrong += (
        [] if f"{moving:>16}  several_frames" in checked.said and checked.exit_code == 0 else ["the check's counts"]
    )
    output = folder / "out"
    given = {
        "data_json_file": folder / "rows.jsonl", "data_root_path": folder, "max_fault_rate": 1.0,
        "train_batch_size": _BATCH, "max_train_steps": -(-len(listed) // _BATCH), "save_steps": 1000,
    }  # fmt: skip
    code, _ = lab.run("train", lab.training(output, **given))
    wrong += _differing("train", listed, _kinds_of(output)) if code == 0 else [f"train: exit {code}"]
    count = Counter(type(case) for case in listed)
    note = (
        f"{count[Sound]} pictures read within 1/255 of a reference, {count[Broken]} files named for what they are, by "
    )
    note += "check and by train" + _listed(wrong)
    yield Finding("pictures of every mode, depth, turn and damage", len(listed), len(wrong), not wrong, note)


def flips(lab: Lab) -> Iterator[Finding]:
    """One bit flipped at a random place in each of many pictures, checked with and without their recorded hashes."""
    folder, chance = lab.place("flips"), random.Random(0)
    smooth = [case for case in sound() if case.frames == 1]
    names, sums, silent = [], [], 0
    for number in range(lab.tries(FLIPS)):
        case = smooth[number % len(smooth)]
        flipped = bytearray(case.content)
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        names.append(f"{number:04d}{case.ending}")
        sums.append(f"{hashlib.sha256(case.content).hexdigest()}  {names[-1]}\n")
        (folder / names[-1]).write_bytes(flipped)
        silent += _is_another_picture(bytes(flipped), case)
    manifest, listed = folder / "rows.jsonl", folder / "SHA256SUMS"
    manifest.write_text("".join(row(name) + "\n" for name in names))
    listed.write_text("".join(sums))
    without, with_hashes = check(lab, manifest), check(lab, manifest, image_hashes_file=listed)
    kinds = [[fault.kind for fault in with_hashes.faults.get(number, [])] for number in range(1, len(names) + 1)]
    missed = sum(told != ["changed"] for told in kinds)
    good = not missed and (without.exit_code, with_hashes.exit_code) == (0, 3)  # of hashes that all differ none trains
    note = f"with recorded hashes {len(names) - missed} told as changed; without, {len(without.faults)} are faults and "
    note += f"{silent} are read with pixels more than 1/255 off"
    yield Finding("a flipped bit in a picture", len(names), missed, good, note)


def bombs(lab: Lab) -> Iterator[Finding]:
    """Each bomb of the corpus alone in a set, checked; the most memory held, beside that of an ordinary picture."""
    folder = lab.place("bombs")
    chosen = [case for case in broken() if case.bomb][:: max(1, round(1 / lab.share))]
    plain = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    base_mb, _ = _peak_mb(lab, folder, "plain.png", encoded(plain, "PNG"))
    costs_mb = {}
    wrong = []
    for number, case in enumerate(chosen):
        assert case.content is not None
        peak_mb, kinds = _peak_mb(lab, folder, f"{number}{case.ending}", case.content)
        costs_mb[case.what] = peak_mb - base_mb
        if peak_mb - base_mb >= BOMB_LIMIT_MB or not set(kinds) <= set(case.kinds) or len(kinds) != 1:
            wrong.append(case.what)
    dearest = max(costs_mb, key=lambda what: costs_mb[what])
    note = f"at most {max(0.0, costs_mb[dearest]):.1f} MB over a check of a 512 px PNG ({base_mb:.0f} MB; limit "
    note += f"{BOMB_LIMIT_MB} MB); the dearest: {dearest}" + _listed(wrong)
    yield Finding("decompression bombs", len(chosen), len(wrong), not wrong, note)


def replaced(lab: Lab) -> Iterator[Finding]:
    """A run with broken pictures beside one without: what stands in is the same every time, all else is untouched."""
    folder = lab.place("replaced")
    shutil.copytree(lab.pocket / "images", folder / "images")
    given = {"data_root_path": folder / "images", "max_fault_rate": 0.5, "save_steps": 6}
    whole = _trained(lab, folder / "whole", given)
    rows = json.loads((lab.pocket / "data.json").read_text())
    hurt = [3, 4, 11, len(rows) - 1]
    for number in hurt:
        file = folder / "images" / rows[number]["image_file"]
        file.write_bytes(file.read_bytes()[:-40])
    once, twice, halves = (_trained(lab, folder / name, given) for name in ("once", "twice", "halves"))
    shutil.rmtree(folder / "halves" / "checkpoint-12")
    halves = halves[:6] + _trained(lab, folder / "halves", {**given, "resume_from_checkpoint": "latest"})
    wrong = [] if once == twice == halves else ["rows"]
    wrong += ["bytes"] if len({_final(folder / name) for name in ("once", "twice", "halves")}) > 1 else []
    pairs = [(a, b) for before, after in zip(whole, once, strict=True) for a, b in zip(before, after, strict=True)]
    wrong += ["order"] if any(a != b and (a[0] != b[0] or a[1] not in hurt) for a, b in pairs) else []
    wrong += ["stand-ins"] if any(b[1] in hurt for _, b in pairs) or all(a == b for a, b in pairs) else []
    stood_in = sum(a != b for a, b in pairs)
    kinds = Counter(kind for told in _kinds_of(folder / "once").values() for kind in told)
    note = (
        f"{stood_in} of {len(pairs)} images came from a stand-in, the other (index, row) pairs are those of the whole "
    )
    note += f"run; a second and a resumed run: same rows, same bytes; listed: {dict(kinds)}" + _listed(wrong)
    yield Finding("broken pictures are replaced in order", len(pairs), len(wrong), not wrong, note)
    yield _over_the_limit(lab, folder)
    yield _shared(lab, folder, len(hurt))


def _over_the_limit(lab: Lab, folder: Path) -> Finding:
    """The same broken set where one row may be faulty."""
    given = {"data_root_path": folder / "images", "max_fault_rate": 0.05}
    code, said = lab.run("train", lab.training(folder / "over", **given))
    checked = check(lab, lab.pocket / "data.json", data_root_path=folder / "images", max_fault_rate=0.05)
    good = code == 3 and checked.exit_code == 3 and "--max_fault_rate" in said and "faults.jsonl" in said
    note = f"train: exit {code}, check: exit {checked.exit_code}, 2 of 24 rows being one too many"
    return Finding("more faulty rows than allowed", 2, 0 if good else 1, good, note)


def _shared(lab: Lab, folder: Path, hurt: int) -> Finding:
    """The same broken set in two processes, of which each meets a part of its rows in the first epoch."""
    given = {"data_root_path": folder / "images", "train_batch_size": 1, "save_steps": 100}
    least = {**given, "max_fault_rate": (hurt - 0.5) / ROWS, "max_train_steps": ROWS // 2}
    code, said = lab.run("train", lab.training(folder / "least", **least), processes=2)
    wrong = [] if code and f"error: {hurt} of {ROWS} rows are faulty" in said else [f"the limit: exit {code}"]
    loose = {**given, "max_fault_rate": 0.5, "max_train_steps": 3 * ROWS // 2}
    code, _ = lab.run("train", lab.training(folder / "loose", **loose), processes=2)
    places = [json.loads(line)["where"] for line in (folder / "loose" / "faults.jsonl").read_text().splitlines()]
    wrong += [] if code == 0 and len(places) == len(set(places)) == hurt else [f"{len(places)} lines, exit {code}"]
    note = f"{hurt} of {ROWS} rows, one too many for both together: the run ends; where they are allowed, each is "
    note += "listed once in three epochs" + _listed(wrong)
    return Finding("faulty rows that two processes share", 2, len(wrong), not wrong, note)


def _write_files(folder: Path) -> Sequence[Sound | Broken]:
    """Files and `rows.jsonl`; a case's place in the list, from 1, is its row's line. No two broken ones in a row."""
    listed = [case for pair in zip_longest(sound(), broken()) for case in pair if case is not None]
    lines = []
    for number, case in enumerate(listed):
        name = f"{number:03d}{case.ending}"
        lines.append(row(name, case.what))
        if case.content is not None:
            (folder / name).write_bytes(case.content)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return listed


def _is_another_picture(content: bytes, case: Sound) -> bool:
    """Whether a file is read, but not as the picture of the case."""
    try:
        given = np.asarray(decode(content, Limits(), BACKGROUND).image, dtype=float)
    except ImageFault:
        return False
    return given.shape != case.pixels.shape or bool(np.abs(given - case.pixels).max() > 1)


def _pixels_are_right(case: Sound) -> bool:
    try:
        picture = decode(case.content, Limits(), BACKGROUND)
    except ImageFault:
        return False
    given = np.asarray(picture.image, dtype=float)
    return given.shape == case.pixels.shape and bool(np.abs(given - case.pixels).max() <= 1)


def _differing(by: str, listed: Sequence[Sound | Broken], kinds: dict[int, list[str]]) -> list[str]:
    """Cases that were not told as one fault of the right kind, or as none."""
    expected = [case.kinds if isinstance(case, Broken) else () for case in listed]
    found = [kinds.get(number, []) for number in range(1, len(listed) + 1)]
    return [
        f"{by}: {case.what} {told}"
        for case, right, told in zip(listed, expected, found, strict=True)
        if not (len(told) == 1 and told[0] in right if right else not told)
    ]


def _kinds_of(output: Path) -> dict[int, list[str]]:
    """Kinds of the faults that a run listed, by the number of the row."""
    kinds: dict[int, list[str]] = {}
    for line in (output / "faults.jsonl").read_text().splitlines():
        fault = json.loads(line)
        kinds.setdefault(int(fault["where"].split()[2]), []).append(fault["kind"])
    return kinds


def _peak_mb(lab: Lab, folder: Path, name: str, content: bytes) -> tuple[float, list[str]]:
    """The most memory that a check of one file held, and the kinds of fault it told."""
    (folder / name).write_bytes(content)
    (folder / "rows.jsonl").write_text(row(name) + "\n")
    checked = check(lab, folder / "rows.jsonl", watched=True)
    (peak,) = (event["peak_bytes"] for event in seen(lab.folder, checked.pid) if "peak_bytes" in event)
    return peak / 2**20, [fault.kind for fault in checked.faults.get(1, [])]


def _trained(lab: Lab, output: Path, given: dict[str, object]) -> list[list[tuple[int, int]]]:
    """The (index, row) pairs of each batch of a run of 12 steps, or of what was left of it."""
    process = lab.start("train", lab.training(output, **given), script="faults.watch")
    code = process.wait()
    assert code == 0, process.said
    events = [event for event in seen(lab.folder, process.pid) if "row" in event]
    return [list(zip(event["index"], event["row"], strict=True)) for event in events]


def _final(output: Path) -> tuple[bytes, ...]:
    """What must be the same: metrics, adapter, optimizer and averages at the end."""
    files = [output / "checkpoint-12" / name for name in ("pytorch_model.bin", "training_state.safetensors")]
    return ((output / "metrics.jsonl").read_bytes(), *(file.read_bytes() for file in files))


def _listed(wrong: Sequence[str]) -> str:
    return f"; not so: {', '.join(wrong[:8])}" if wrong else ""
