"""Counter streams, the registry, errors."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ip_adapter_trainer.core.errors import Problem, StorageProblem, as_load_problem, did_you_mean
from ip_adapter_trainer.core.redact import one_line
from ip_adapter_trainer.core.registry import Registry
from ip_adapter_trainer.core.rng import key, stream
from ip_adapter_trainer.runtime import launch
from ip_adapter_trainer.runtime.launch import Runtime
from ip_adapter_trainer.runtime.precision import on_device, usual


@given(st.integers(0, 2**31), st.text(max_size=8), st.lists(st.integers(0, 2**40), max_size=3))
def test_a_stream_is_a_function_of_its_key(seed: int, purpose: str, counters: list[int]) -> None:
    a, b = (stream(seed, purpose, *counters).random(4) for _ in range(2))
    assert np.array_equal(a, b)


@given(st.integers(0, 2**31), st.integers(0, 2**40))
def test_a_stream_is_philox_under_its_key(seed: int, counter: int) -> None:
    ours, plain = stream(seed, "noise", counter), np.random.Generator(np.random.Philox(key=key(seed, "noise", counter)))
    assert ours.random() == plain.random() and ours.integers(1000) == plain.integers(1000)
    assert np.array_equal(ours.standard_normal(9, np.float32), plain.standard_normal(9, np.float32))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_neighbouring_keys_differ(i: int, j: int) -> None:
    assert (key(0, "noise", i) == key(0, "noise", j)) == (i == j)
    assert key(0, "noise", i, j) != key(0, "noise", i)


def test_streams_are_standard_normal_and_independent() -> None:
    draws = np.stack([stream(0, "noise", i).standard_normal(256) for i in range(400)])
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01


def test_golden_values_keep_old_runs_resumable() -> None:
    assert key(0, "noise", 7) == 209750461367713416406844722377396588376
    assert stream(1, "order", 0).permutation(6).tolist() == [5, 2, 0, 1, 4, 3]


@given(st.integers(0, 50), st.integers(1, 8))
def test_the_processes_of_a_machine_share_without_gap_or_overlap(count: int, processes: int) -> None:
    runtimes = [Runtime(None, 0, 16, torch.device("cpu"), "no", rank, processes) for rank in range(processes)]
    portions = [runtime.portion(count) for runtime in runtimes]
    assert [number for portion in portions for number in portion] == list(range(count))
    assert max(map(len, portions)) - min(map(len, portions)) <= 1


@pytest.mark.parametrize(("mine", "other", "raised"), [
    (None, None, None), (None, "full", r"full \(found by rank 1\)"), ("no", None, "no"), ("no", "full", "no"),
])  # fmt: skip
def test_a_problem_of_one_process_is_raised_on_all(
    monkeypatch: pytest.MonkeyPatch, mine: str | None, other: str | None, raised: str | None
) -> None:
    monkeypatch.setattr(Runtime, "gathered", lambda self, own: [own, StorageProblem(other) if other else None])
    runtime = Runtime(None, 0, 2, torch.device("cpu"), "no")
    with pytest.raises(Problem, match=raised) if raised else nullcontext(), runtime.agreed():
        if mine:
            raise Problem(mine)


@pytest.mark.parametrize("able, emulates", [({"avx512_f": True, "amx_bf16": False}, True), ({"amx_bf16": True}, False)])
def test_a_cpu_that_emulates_bf16_is_told_of(
    able: dict[str, bool], emulates: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert [on_device(name, "cpu") for name in ("no", "bf16")] == ["no", "bf16"]
    assert capsys.readouterr().err.count("emulates bf16") == emulates
    assert usual("cpu") == ("no" if emulates else "bf16")
    on_device("bf16", "cuda")
    assert not capsys.readouterr().err


def test_unknown_names_get_a_hint() -> None:
    registry: Registry[object] = Registry("things", "ip_adapter_trainer.nn")
    registry.register("plus")(type("Plus", (), {}))
    with pytest.raises(Problem, match="did you mean 'plus'"):
        registry["pluss"]
    assert did_you_mean("zzz", ["a", "b"]) == "known: a, b"


@given(st.text(max_size=2000))
def test_a_stranger_s_words_become_one_line_that_stays_as_it_is(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() and len(line) <= 400 and one_line(line) == line
    assert line == text if len(text) <= 400 and text.isprintable() else line != text


def test_what_a_library_says_of_a_model_is_a_problem_even_if_it_says_nothing() -> None:
    for error, said in ((KeyError(), "KeyError"), (RuntimeError("one\ntwo"), "one"), (ValueError("\n"), "ValueError")):
        with pytest.raises(Problem) as caught, as_load_problem("it", "there", "another"):
            raise error
        assert str(caught.value).splitlines()[0] == f"cannot load it: {said}"
        assert (caught.value.fault.where, caught.value.fault.remedy) == ("there", "another")


def test_a_problem_says_what_where_and_what_to_do() -> None:
    assert str(Problem("broken", where="here", remedy="mend it")) == "broken\n  where: here\n  to do: mend it"


PLUGIN = '''
"""A variant and a family from another package, each one file."""
from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.adapters.base import Base, BaseConfig
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.families.sd import StableDiffusion
from ip_adapter_trainer.core.settings import Part
from pydantic import Field

class TallConfig(BaseConfig):
    tallness: int = Field(3, description="How tall.")

@VARIANTS.register("tall")
class Tall(Base):
    Config = TallConfig

class OtherConfig(Part):
    otherness: int = Field(3, description="How different.")

@FAMILIES.register("other")
class Other(StableDiffusion):
    Config = OtherConfig
    name = "other"
    @classmethod
    def matches(cls, model_index):
        return model_index.get("_class_name") == "OtherPipeline"
'''


def test_a_new_family_and_a_new_variant_are_one_file_in_any_installed_package(tmp_path: Path) -> None:
    (tmp_path / "extra_adapters.py").write_text(PLUGIN)
    info = tmp_path / "extra_adapters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-adapters\nVersion: 1.0\n")
    points = "".join(f"[ip_adapter_trainer.{kind}]\nextra = extra_adapters\n\n" for kind in ("variants", "families"))
    (info / "entry_points.txt").write_text(points)
    code = (
        "from ip_adapter_trainer.adapters import VARIANTS\n"
        "from ip_adapter_trainer.families import FAMILIES\n"
        "from ip_adapter_trainer.config import parse_train\n"
        "needed = ['--pretrained_model_name_or_path=b', '--image_encoder_path=e', '--data_json_file=d']\n"
        "own = ['--variant=tall', '--tallness=1', '--family=other', '--otherness=2']\n"
        "config = parse_train([*needed, *own], look=lambda first: None)\n"
        "print(list(VARIANTS), list(FAMILIES), config.tallness, config.otherness)"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    out = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert out.stdout.split("\n")[0] == "['base', 'full', 'plus', 'tall'] ['other', 'sd', 'sdxl'] 1 2", out.stderr


@pytest.mark.parametrize(("device", "asked", "encoded", "expected"), [
    ("cpu", None, False, 0), ("cpu", 3, False, 3), ("cuda", None, False, 5), ("cuda", None, True, 0),
    ("cuda", 0, False, 0), ("cuda", 2, True, 2),
])  # fmt: skip
def test_workers_read_images_beside_a_gpu_where_nobody_names_their_number(
    device: str, asked: int | None, encoded: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "core_count", lambda: 12)
    runtime = Runtime(None, 0, 2, torch.device(device), "no", local_world=2)
    assert runtime.data_workers(asked, encoded=encoded) == expected
