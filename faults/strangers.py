"""Files from strangers: what reads them refuses them, executes nothing and allocates nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from faults.corpus import documents, models, pickles, tensors
from faults.lab import Finding, Lab
from faults.peak import peak_mb

LIMIT_MB = 64.0  # over the same command on a good file
PATIENCE_S = 120.0
Write = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A hostile file or folder.

    Attributes:
        name: of the case.
        write: makes it at a path, where a copy of the good one is if it is a folder.
        file: the path's last part.
        codes: exit codes that are right.
    """

    name: str
    write: Write
    file: str
    codes: tuple[int, ...] = (2,)


class Hosts:
    """Good files of each kind, and the commands that read such files."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.folder = lab, lab.folder / "good"
        self.run, self.adapter, self.set = self.folder / "run", self.folder / "good.safetensors", self.folder / "set"
        self._base_mb: dict[str, float] = {}
        if self.set.exists():
            return
        self.folder.mkdir(exist_ok=True)
        self._demand("train", lab.training(self.run, max_train_steps=2, save_steps=1))
        self._demand("export", {"output": self.adapter}, operands=[self.checkpoint])
        self._demand("prepare", {**lab.inputs, "prepared_dir": self.set, "prepare_text": True})

    def _demand(self, command: str, settings: dict[str, Any], **how: Any) -> None:
        code, said = self.lab.run(command, settings, **how)
        assert code == 0, said

    @property
    def checkpoint(self) -> Path:
        """A good checkpoint."""
        return self.run / "checkpoint-2"

    def copy(self) -> Path:
        """A copy of the good checkpoint, to be damaged."""
        return shutil.copytree(self.checkpoint, self.lab.place("copy") / self.checkpoint.name)

    @property
    def tables(self) -> list[str]:
        """Of the good set: what is known of its pictures, their latents and features, and its captions."""
        return sorted(folder.name for folder in self.set.iterdir() if folder.is_dir())

    def start(self, command: str, path: Path) -> tuple[int, str]:
        """Has a command read a file, or a folder, of its kind: exit code and what it said.

        Raises:
            TimeoutError: it does not end.
        """
        lab, out = self.lab, self.lab.place("out") / "out"
        draws = {"adapter": path, "output": out, "num_inference_steps": 1, "batch_size": 2}
        scored = {"clip_model": lab.pocket / "clip", "num_rows": 2, "num_images_per_prompt": 1, **draws}
        rows = {name: lab.inputs[name] for name in ("data_json_file", "data_root_path")}
        picture = next((lab.pocket / "images").glob("*.png"))
        short: dict[str, Any] = {"max_train_steps": 1}
        settings: dict[str, tuple[dict[str, Any], list[object]]] = {
            "inspect": ({}, [path]),
            "export": ({"output": out.with_suffix(".bin")}, [path]),
            "generate": ({**draws, "image": picture}, []),
            "evaluate": ({**scored, **rows}, []),
            "evaluate --clip_model": ({**scored, **rows, "clip_model": path, "adapter": self.adapter}, []),
            "train": (lab.training(out, pretrained_ip_adapter_path=path, **short), []),
            "train --resume": (lab.training(out, resume_from_checkpoint=path, max_train_steps=3), []),
            "train in a run's folder": (lab.training(path, resume_from_checkpoint="latest", max_train_steps=3), []),
            "train --prepared_dir": (lab.training(out, prepared_dir=path, prepare_text=True, **short), []),
            "train --config": ({"config": path}, []),
            "train on base": (lab.training(out, pretrained_model_name_or_path=path, **short), []),
            "train with encoder": (lab.training(out, image_encoder_path=path, **short), []),
        }
        flags, named = settings[command]
        process = lab.start(command.split()[0], flags, operands=named, script="faults.peak")
        return process.wait(PATIENCE_S), process.said

    def good(self, command: str) -> Path:
        """What a command reads without complaint."""
        here = self.lab.pocket
        own = {
            "train --resume": self.checkpoint, "train in a run's folder": self.run, "train --prepared_dir": self.set,
            "train on base": here / "base", "train with encoder": here / "image_encoder",
            "evaluate --clip_model": here / "clip",
        }  # fmt: skip
        return own.get(command, self.adapter)

    def base_mb(self, command: str) -> float:
        """The most memory that a command holds with a good file.

        Raises:
            AssertionError: it does not take the good file.
        """
        if command not in self._base_mb:
            path = self.good(command)
            if command == "train in a run's folder":
                path = shutil.copytree(path, self.lab.place("run") / "run")
            if command == "train --config":
                path = self.lab.place("settings") / "good.yaml"
                path.write_text(self.settings(path.parent / "out"))
            code, said = self.start(command, path)
            assert code == 0, f"{command}: {said}"
            self._base_mb[command] = peak_mb(said)
        return self._base_mb[command]

    def settings(self, output: Path) -> str:
        """A good run's settings as YAML."""
        settings = {k: v if isinstance(v, int) else str(v) for k, v in self.lab.training(output).items()}
        return yaml.safe_dump(settings | {"max_train_steps": 1})


@dataclass
class Tally:
    """What became of the cases so far."""

    tries: int = 0
    lost: int = 0
    worst_mb: float = -1e9
    first: str = ""

    def note(self, name: str, wrong: Sequence[str], over_mb: float) -> None:
        """Adds a case, and what was wrong with how it ended."""
        self.tries += 1
        self.lost += bool(wrong)
        self.worst_mb = max(self.worst_mb, over_mb)
        if wrong and not self.first:
            self.first = f"; first: {name}: {', '.join(wrong)}"
        if wrong:
            print(f"  {name}: {', '.join(wrong)}", flush=True)

    def finding(self, fault: str, done: str) -> Finding:
        """The finding, with the memory at the worst."""
        worst_mb = max(0.0, self.worst_mb)
        note = f"{done}; {worst_mb:.0f} MB over a good file at the most (limit {LIMIT_MB:.0f}){self.first}"
        return Finding(fault, self.tries, self.lost, not self.lost, note)


def _try(hosts: Hosts, tally: Tally, marker: Path, command: str, case: Case) -> None:
    """Has a command read a case, and judges how it ended."""
    path, good = hosts.lab.place("case") / case.file, hosts.good(command)
    if good.is_dir() and command != "train --config":
        shutil.copytree(good, path)
    case.write(path)
    wrong, over_mb = [], 0.0
    try:
        code, said = hosts.start(command, path)
    except TimeoutError:
        code, said, wrong = 0, "", [f"did not end in {PATIENCE_S:.0f} s"]
    else:
        over_mb = peak_mb(said) - hosts.base_mb(command)
        if code not in case.codes:
            wrong.append(f"exit {code} ({_cause(said)[:150]})")
        elif code and "to do:" not in said and "╭─" not in said:  # the box is that of the parser of flags
            wrong.append("no remedy")
        if over_mb > LIMIT_MB:
            wrong.append(f"{over_mb:.0f} MB over a good file")
        if any(ord(letter) < 32 and letter not in "\n\r\t" for letter in said):
            wrong.append("a control character on the terminal")
    if marker.exists():
        marker.unlink()
        wrong.append("EXECUTED")
    tally.note(f"{command}: {case.name}", wrong, over_mb)
    shutil.rmtree(path.parent)


def _cause(said: str) -> str:
    """The line that tells an error, else the first one."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith(("error: ", "bug: "))), lines[0])


def _some(lab: Lab, cases: Iterable[tuple[str, Case]]) -> list[tuple[str, Case]]:
    """As many of the cases as the lab's share has it, evenly chosen."""
    every = list(cases)
    count = lab.tries(len(every))
    return [every[number * len(every) // count] for number in range(count)]


def _bytes(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def _dealt(cases: Iterable[Case], commands: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """Every case to the first command, and every third in turn to one of the others, which are slower."""
    for number, case in enumerate(cases):
        yield commands[0], case
        if number % 3 == 0:
            yield commands[1 + number // 3 % len(commands[1:])], case


ADAPTER = ("inspect", "export", "generate", "train", "evaluate")


def pickled(lab: Lab) -> Iterator[Finding]:
    """Pickles wherever a file could hold one; none is executed."""
    hosts, tally, marker = Hosts(lab), Tally(), lab.place("pickles") / "executed"
    hostile = list(pickles.hostile(marker))
    payload, raw = hostile[1][1], hostile[0][1]
    bins = [Case(name, _bytes(content), "ip_adapter.bin") for name, content in hostile]
    cases = [*_dealt(bins, ADAPTER), ("inspect", Case("renamed", _bytes(payload), "a.safetensors"))]
    for name in documents.FOREIGN:
        case = Case(f"{name} beside", partial(documents.write_into, name, raw), "checkpoint-2", (0,))
        cases.append(("train --resume", case))
    for name in documents.FILES:
        beside = [entry for entry in documents.checkpoints(raw) if entry[0] == f"a pickle for {name}"]
        cases += [("train --resume", Case(title, damage, "checkpoint-2")) for title, damage in beside]
    for title, damage in [*models.pipelines(payload, marker)]:
        if "pickle" in title or "index of" in title:
            cases.append(("train on base", Case(title, damage, "base")))
    for command in ("train with encoder", "evaluate --clip_model"):
        cases += [(command, Case(title, damage, "clip")) for title, damage in models.encoders(payload, marker)]
        cases += [(command, Case(title, damage, "clip", (0, 2))) for title, damage in models.ignored(marker)]
    for table in hosts.tables:
        pickled = Case(f"pickles for the shards of {table}", _every_shard(table, lambda _: payload), "set")
        cases.append(("train --prepared_dir", pickled))
    cases.append(
        ("train --prepared_dir", Case("a pickle beside", lambda f: (f / "i.pkl").write_bytes(raw), "set", (0,)))
    )
    for command, case in _some(lab, cases):
        _try(hosts, tally, marker, command, case)
    yield tally.finding("pickles in adapters, checkpoints, sets and models", "calls that would leave a mark; none may")


def _every_shard(table: str, change: Callable[[bytes], bytes]) -> Write:
    def done(folder: Path) -> None:
        for shard in (folder / table).rglob("*.safetensors"):
            shard.write_bytes(change(shard.read_bytes()))

    return done


def forged(lab: Lab) -> Iterator[Finding]:
    """Tensors files, checkpoints, sets and models that lie about their sizes."""
    hosts, tally, marker = Hosts(lab), Tally(), lab.place("forged") / "executed"
    good = tensors.File.read(hosts.adapter)
    makers = (*tensors.lies(good), *tensors.misfits(good))
    files = [Case(name, _bytes(content), "a.safetensors") for name, content in makers]
    files += [Case(name, _bytes(content), "a.bin") for name, content in pickles.bombs()]
    cases = [*_dealt(files, ADAPTER)]
    for number, (name, content) in enumerate(tensors.cards(good)):  # who builds no model of it need not look at it
        cases.append((ADAPTER[1 + number % 2], Case(name, _bytes(content), "a.safetensors")))
        cases.append((ADAPTER[number % 2 * 3], Case(name, _bytes(content), "a.safetensors", (0, 2))))
    cases += [("train --resume", Case(t, d, "checkpoint-2")) for t, d in documents.checkpoints(b"\x80\x02N.")]
    cases += [("train on base", Case(t, d, "base")) for t, d in models.pipelines(b"\x80\x02N.", marker)]
    for table in hosts.tables:  # one alone each time, or the first that is opened would stand before the others
        for name, change in _shards():
            cases.append(("train --prepared_dir", Case(f"{table}: {name}", _every_shard(table, change), "set")))
    for command, case in _some(lab, cases):
        _try(hosts, tally, marker, command, case)
    yield tally.finding("forged and oversized files", "refused with exit 2 and a remedy")


def _shards() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """What is done to a set's shards."""
    yield "shards cut in the middle", lambda shard: shard[: len(shard) // 2]
    yield "empty shards", lambda _: b""
    yield "shards with a header of 2^63 bytes", lambda shard: b"\xff" * 8 + shard[8:]
    yield "shards of text", lambda _: b"text" * 1000
    for old, new in ((b'"shape":[', b'"shape":[9'), (b'"data_offsets":[0', b'"data_offsets":[8'), (b"U8", b"F9")):
        yield f"shards with {new.decode()}", partial(_replaced, old, new)
    yield "shards nested deep", lambda shard: (4000).to_bytes(8, "little") + b"[" * 4000 + shard


def _replaced(old: bytes, new: bytes, shard: bytes) -> bytes:
    return shard.replace(old, new, 1)


def configs(lab: Lab) -> Iterator[Finding]:
    """Settings files that are refused before a run begins."""
    hosts, tally, marker = Hosts(lab), Tally(), lab.place("configs") / "executed"
    cases = []
    for name, text in documents.settings(marker):
        base = hosts.settings(lab.folder / "never")
        content = f"{base}{text}\n".encode("utf-8", "surrogateescape")
        cases.append(("train --config", Case(name, _bytes(content), "config.yaml")))
    for command, case in _some(lab, cases):
        _try(hosts, tally, marker, command, case)
    if (lab.folder / "never").exists():
        tally.note("the output folder", ["a refused run wrote it"], 0.0)
    yield tally.finding("hostile settings files", "YAML tags, aliases, nesting, huge numbers, flags in lists")


def fault_lists(lab: Lab) -> Iterator[Finding]:
    """Runs that are resumed where the list of their faults is not what a run writes."""
    hosts, tally, marker = Hosts(lab), Tally(), lab.place("lists") / "executed"
    cases = [Case(title, damage, "run", (0, 2)) for title, damage in documents.fault_lists()]
    for command, case in _some(lab, (("train in a run's folder", case) for case in cases)):
        _try(hosts, tally, marker, command, case)
    yield tally.finding("a damaged list of faults at resume", "the run goes on, or is refused with exit 2 and a remedy")
