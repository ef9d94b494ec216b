"""Files from strangers are refused by their readers: nothing is executed, nothing is built of what they claim."""

from __future__ import annotations

import pickle
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.corpus import documents, models, pickles, tensors
from faults.fuzz import Fuzz, seeded
from faults.lab import Lab
from faults.peak import peak_mb
from faults.readers import Target
from ip_adapter_trainer.adapter_files import read_adapter
from ip_adapter_trainer.adapter_files.raw import read_raw
from ip_adapter_trainer.cli import RUN, guarded
from ip_adapter_trainer.config import parse_train
from ip_adapter_trainer.core.errors import Fault, Problem
from ip_adapter_trainer.core.log import say
from ip_adapter_trainer.core.redact import redacted
from ip_adapter_trainer.evaluate.clip import ClipScorer
from ip_adapter_trainer.inspection import examine
from ip_adapter_trainer.loading.base import load_base
from ip_adapter_trainer.loading.encoder import load_encoder
from ip_adapter_trainer.manifest.faults import FILE_NAME
from ip_adapter_trainer.train import checkpoint, restored
from tests import tiny

TOKEN = "hf_" + "a1B2" * 9
LARGE = ("a header of 900,000 tensors", "an archive that unpacks to 160 MB")  # the lab makes them


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def refused(read: Callable[[], object]) -> str:
    """What a reader said, in one line; empty if it took what it read."""
    try:
        read()
    except Problem as problem:
        assert problem.fault.remedy
        return str(problem)
    except SystemExit as ended:  # of the parser of flags
        return f"exit {ended.code}"
    return ""


def test_every_payload_would_act(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name, payload in pickles.payloads(marker).items():
        pickle.loads(payload)
        assert marker.exists(), name
        marker.unlink()


def test_no_adapter_file_of_a_stranger_is_taken(fuzz: Fuzz, tmp_path: Path, marker: Path) -> None:
    good = tmp_path / "good.safetensors"
    good.write_bytes(fuzz.targets["adapter.safetensors"].seed)
    parts = tensors.File.read(good)
    every = [(".safetensors", *case) for case in (*tensors.lies(parts), *tensors.misfits(parts), *tensors.cards(parts))]
    every += [(".bin", *case) for case in (*pickles.hostile(marker), *pickles.bombs())]
    taken = []
    for suffix, name, content in every:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        if name not in LARGE and not refused(lambda path=path: (examine(path), read_adapter(path).config())):
            taken.append(name)
    assert not taken


def test_archives_that_two_readers_read_differently_are_not_opened(tmp_path: Path) -> None:
    path, opened = tmp_path / "a.bin", []
    for name, content in pickles.bombs():
        path.write_bytes(content)
        if name.startswith("a bytearray") and not refused(lambda: read_raw(path)):  # once read, it is an empty table
            opened.append(name)
    assert not opened


def test_no_checkpoint_of_a_stranger_is_taken_up(fuzz: Fuzz, tmp_path: Path, marker: Path) -> None:
    home = next(Path(fuzz.folder).glob("checkpoint-1"))
    mine = torch.load(home / documents.WEIGHTS, weights_only=True)
    trained = [value for _, value in sorted(mine.items())]

    def read(folder: Path) -> None:
        saved = checkpoint.read(folder)
        restored.demand_fits(saved.weights, mine, saved.state["optimizer"], trained)

    assert not refused(lambda: read(home))
    taken = []
    for name, damage in documents.checkpoints(pickles.payloads(marker)["os.system"]):
        folder = tmp_path / "checkpoint-1"
        shutil.copytree(home, folder)
        damage(folder)
        if not refused(lambda folder=folder: read(folder)):
            taken.append(name)
        shutil.rmtree(folder)
    assert not taken


def test_no_settings_of_a_stranger_are_taken(
    base_folder: Callable, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = f"pretrained_model_name_or_path: {base_folder('sd1')}\nimage_encoder_path: e\ndata_json_file: d.json\n"
    path, taken = tmp_path / "config.yaml", []
    path.write_text(head)
    assert not refused(lambda: parse_train([f"--config={path}"]))
    for name, text in documents.settings(marker):
        path.write_bytes(f"{head}{text}\n".encode("utf-8", "surrogateescape"))
        said = refused(lambda: parse_train([f"--config={path}"]))
        if not said or "open-sesame" in said or "a1B2" in said:
            taken.append(name)
    assert not taken


def test_no_base_model_of_a_stranger_is_loaded(
    base_folder: Callable, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    taken: list[str] = []
    payload = pickles.archive(pickles.payloads(marker)["os.system"])
    for name, damage in models.pipelines(payload, marker):
        folder = tmp_path / "lib" / "base"
        shutil.copytree(base_folder("sd1"), folder)
        damage(folder)
        if not refused(lambda folder=folder: load_base(str(folder), dtype=torch.float32, device="cpu")):
            taken.append(name)
        shutil.rmtree(folder.parent)
    assert not taken


def test_no_encoder_of_a_stranger_is_loaded(encoder_folder: Path, tmp_path: Path, marker: Path) -> None:
    payload, taken = pickles.archive(pickles.payloads(marker)["os.system"]), []
    for name, damage in models.encoders(payload, marker):
        folder = tmp_path / "lib" / "encoder"
        shutil.copytree(encoder_folder, folder)
        damage(folder)
        loads: dict[str, Callable[[], object]] = {
            "encoder": partial(load_encoder, str(folder), features=tiny.FEATURES, dtype=torch.float32),
            "scorer": partial(ClipScorer.load, str(folder), torch.device("cpu")),
        }
        taken += [f"{what}: {name}" for what, load in loads.items() if not refused(load)]
        shutil.rmtree(folder.parent)
    assert not taken


NAMES = [
    "adapter.safetensors", "unsigned adapter.safetensors", "adapter.bin", "adapter.json", "shard", "config.yaml",
    "rows.json", "rows.jsonl", "rows.csv", FILE_NAME, *documents.FILES[:3], documents.MANIFEST,
]  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**32), way=st.integers(0, 1))
def test_mutated_files_are_read_or_refused(fuzz: Fuzz, name: str, seed: int, way: int) -> None:
    target = fuzz.targets[name]
    fuzz.case(name, target.mutations[way % len(target.mutations)](random.Random(seed), target.seed))


def test_every_target_takes_its_own_file_and_is_fuzzed(fuzz: Fuzz) -> None:
    assert sorted(fuzz.targets) == sorted(NAMES)
    for target in fuzz.targets.values():
        target.read(target.seed)


def _is_refused(content: bytes) -> None:
    raise Problem("no", remedy="another")


def _is_a_bug(content: bytes) -> None:
    raise KeyError("x")


def _never_ends(content: bytes) -> None:
    time.sleep(20)


def _is_large(content: bytes) -> None:
    np.empty(100 * 2**20, np.uint8)


@pytest.mark.parametrize(
    ("read", "found"),
    [(_is_refused, ""), (_is_a_bug, "KeyError"), (_never_ends, "TimeoutError"), (_is_large, "MB more")],
)
def test_what_is_neither_read_nor_refused_is_a_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes], None], found: str
) -> None:
    warmed = list[bytes]()
    good = Target(warmed.append, b"good", (lambda rng, seed: seed,))
    monkeypatch.setattr("faults.readers.targets", lambda folder: {"one": good})
    monkeypatch.setattr("faults.fuzz.LIMIT_S", 0.2)
    monkeypatch.setattr("faults.fuzz._held_mb", lambda: tracemalloc.get_traced_memory()[1] / 2**20)
    fuzz = Fuzz(tmp_path)
    assert warmed == [b"good"], "else the first case would pay for what is imported"
    fuzz.targets["one"] = replace(good, read=read)
    tracemalloc.start()
    try:
        finds = seeded(fuzz, 3, seed=0)
    finally:
        tracemalloc.stop()
    assert fuzz.cases == {"one": 3} and len(finds) == bool(found) and found in "".join(finds)


@pytest.mark.parametrize(
    "text",
    [
        f"a {TOKEN} b", "https://user:open-sesame@example.org/a", "https://open-sesame@example.org", "s3://k:open-sesame@b",
        "https://example.org/a.png?x=1&X-Amz-Signature=open-sesame", "gh" + "p_" + "a1" * 18, "the-open-sesame-itself",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_hidden(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "the-open-sesame-itself")
    shown = redacted(text)
    assert "***" in shown and "sesame" not in shown and TOKEN not in shown and "a1a1" not in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text", ["/data/hf_datasets/a", "user/model-name", "key=value", "a token: b", "https://example.org/a@b", "x@y.org"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_secrets_are_told_by_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    def buggy(argv: object) -> int:
        raise RuntimeError(f"401 for {TOKEN}")

    for flags in ([f"--tracker_project_name={TOKEN}"], ["--grid_prompt", TOKEN], [f"--{TOKEN}"], [f"--debug={TOKEN}"]):
        assert guarded(RUN["train"], flags) == 2
    assert guarded(buggy, ["--debug"]) == 1
    say(f"starting from {TOKEN}")
    print(Problem(TOKEN, TOKEN, TOKEN), Fault("x", TOKEN, TOKEN, TOKEN).where)
    said = "".join(capsys.readouterr())
    assert "--tracker_project_name" in said and "HF_TOKEN" in said and "Traceback" in said and TOKEN not in said


def test_messages_move_no_cursor() -> None:
    assert not {"\x1b", "\x07"} & set(str(Problem("a\x1b[2J", "b\x07", "c")) + str(Fault("k", "w", "\x1b[2J", "r")))


def test_real_commands_refuse_and_tell_their_memory(fuzz: Fuzz, tmp_path: Path, marker: Path) -> None:
    lab = Lab(tmp_path / "lab")
    (tmp_path / "a.bin").write_bytes(pickles.archive(pickles.payloads(marker)["exec"]))
    (tmp_path / "a.yaml").write_text(dict(documents.settings(marker))["billion merges"])
    for command, named, flags in (
        ("inspect", [tmp_path / "a.bin"], {}),
        ("train", [], {"config": tmp_path / "a.yaml"}),
    ):
        code, said = lab.run(command, flags, operands=named, script="faults.peak")
        assert code == 2 and "to do:" in said and 10 < peak_mb(said) < 1000, said
