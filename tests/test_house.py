"""The house keeps its own rules: ranks of imports, lengths of files and functions, no setting that nothing reads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.config import compose
from ip_adapter_trainer.demo import DemoConfig
from ip_adapter_trainer.evaluate.generate import GenerateConfig
from ip_adapter_trainer.evaluate.scores import EvaluateConfig
from ip_adapter_trainer.export import ExportConfig
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.inspection import InspectConfig
from ip_adapter_trainer.pocket.config import PocketConfig
from ip_adapter_trainer.prepare.check import CheckConfig
from ip_adapter_trainer.prepare.config import PrepareConfig
from tools import draw_house
from tools.ranks import PACKAGE, RANKS, imports, unit

FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_to_a_lower_rank_only(file: Path) -> None:
    own = unit(file)
    wrong = [name for name in imports(file) if name != own and RANKS[name] >= RANKS[own]]
    assert not wrong, f"{own} (rank {RANKS[own]}) imports {wrong}"


def test_the_picture_of_the_house_shows_the_present_imports() -> None:
    assert draw_house.FILE.read_text(encoding="utf-8") == draw_house.draw(), "draw it anew: make house"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_keep_their_length(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_names_are_documented(file: Path) -> None:
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    missing = [
        n.name for n in ast.walk(tree)
        if isinstance(n, kinds) and not n.name.startswith("_") and not ast.get_docstring(n)
    ]  # fmt: skip
    assert not missing and (ast.get_docstring(tree) or not tree.body)


def public(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods under a node of the syntax tree, with their qualified names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef):
                yield f"{name}{child.name}", child
            else:
                yield from public(child, f"{name}{child.name}.")


def takes_or_gives_tensors(function: ast.FunctionDef) -> bool:
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    annotations = [node for node in [function.returns, *(a.annotation for a in arguments)] if node]
    return any(re.search(r"\b(Tensor|NDArray|ndarray)\b", ast.unparse(node)) for node in annotations)


SHAPE = re.compile(r"\[[\w.*+/ -]+(, [\w.*+/ -]+)*\]|\bscalar\b|^See `\w+\.\w+`")  # [B, C, h, w], [...], scalar
LACKING = {
    "adapter_files/file.py AdapterFile.tables", "adapters/_variant.py shapes_of",
    "encoders/clip.py ClipImageEncoder.encode_each", "encoders/clip.py ClipImageEncoder.null",
    "families/_family.py Family.condition", "families/sd.py StableDiffusion.encode_captions",
    "loading/weights.py load_tensors", "model.py Adapter.load_published", "model.py Adapter.published",
    "model.py Model.features_of", "nn/attention.py attend_lean", "nn/attention.py gradient_flows",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_functions_of_tensors_tell_their_shapes(file: Path) -> None:
    found = [(name, f) for name, f in public(ast.parse(file.read_text())) if takes_or_gives_tensors(f)]
    lacking = {f"{file.relative_to(PACKAGE)} {n}" for n, f in found if not SHAPE.search(ast.get_docstring(f) or "")}
    assert not lacking - LACKING, "name a shape such as [B, C, h, w], [...] for any, or scalar"


SPOKEN = {
    "cache", "core", "diffusion", "evaluate", "feed", "images", "manifest", "nn", "pocket", "prepare", "runtime",
    "storage", "train",
}  # fmt: skip
LATER = {
    "core/classes.py", "nn/attention.py", "nn/lean.py",
    "nn/packed.py", "prepare/frozen.py", "runtime/early.py", "train/data.py", "train/encoded.py", "train/fixed.py",
    "train/loop.py", "train/run.py", "train/validate.py",
    *(f"{name}/config.py" for name in SPOKEN),
}  # fmt: skip
VERBS = """
    Accept Adapt Add Allow Append Apply Ask Assign Attach Average Begin Build Call Change Check Choose Claim Clear
    Close Collect Combine Compare Compile Compute Connect Convert Copy Count Create Cut Decide Decode Demand Derive
    Describe Detach Divide Do Download Draw Drop Encode End Enter Estimate Evaluate Expand Export Fill Find Finish
    Fit Follow Forget Gather Generate Give Go Group Guess Hand Handle Hash Have Hold Ignore Inspect Join Keep Lay
    Let List Load Log Look Make Map Match Measure Merge Move Name Note Open Pack Parse Pass Place Plan Poll Predict
    Prepare Print Project Put Raise Read Record Refuse Register Release Remove Rename Render Replace Report Resample
    Resize Restore Return Run Sample Save Say Scale Scan Score See Send Set Show Shuffle Skip Sort Split Start Step
    Stop Store Swap Take Tell Train Try Turn Unload Unpack Update Use Verify Wait Warn Watch Work Wrap Write Yield
"""


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if unit(file) in SPOKEN and file.relative_to(PACKAGE).as_posix() not in LATER],
    ids=lambda f: str(f.relative_to(PACKAGE)),
)
def test_docstrings_begin_with_a_verb_of_functions_and_with_no_question_word_of_anything(file: Path) -> None:
    tree = ast.parse(file.read_text())
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    firsts = [(ast.get_docstring(node) or "").partition(" ")[0] for node in named]
    assert not {"What", "Whether", "How", "Where", "That", "Which", "Who", "Whose", "Why", "When"} & set(firsts)
    wrong = {}
    for name, function in public(tree):
        first = (ast.get_docstring(function) or "").split()[0].rstrip(",")
        if first not in VERBS.split() and not any("property" in ast.unparse(d) for d in function.decorator_list):
            wrong[name] = first
    assert not wrong, 'begin with an imperative, as in "Load ..."; a verb that is new here goes into VERBS'


def read_names() -> set[str]:
    """Every attribute that some line of the package reads, and every setting named in a string."""
    found: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.JoinedStr) and "resampler_" in ast.unparse(node):
                found |= {f"resampler_{n}" for n in ("depth", "head_dim", "ff_mult")}
    return found


def settings() -> set[str]:
    commands = [CheckConfig, DemoConfig, EvaluateConfig, ExportConfig, GenerateConfig, InspectConfig, PocketConfig]
    commands += [PrepareConfig]
    kinds = [compose(variant, "sd") for variant in VARIANTS] + commands
    return {name for kind in kinds for name in kind.model_fields}


def test_every_setting_is_read_by_something() -> None:
    assert not settings() - read_names()


def test_every_setting_has_a_help_text() -> None:
    kinds = [compose(v, "sd") for v in VARIANTS] + [GenerateConfig, EvaluateConfig, ExportConfig, CheckConfig]
    kinds += [PrepareConfig]
    assert not [f"{k.__name__}.{n}" for k in kinds for n, f in k.model_fields.items() if not f.description]


@pytest.mark.parametrize("family", [*FAMILIES, "auto"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_setting_of_a_run_is_in_exactly_one_resume_list(variant: str, family: str) -> None:
    kind = compose(variant, family)
    listed = [name for names in kind.resume_lists().values() for name in names]
    assert sorted(listed) == sorted(kind.model_fields)


def test_help_comes_in_half_a_second_without_heavy_imports() -> None:
    code = "import sys; from ip_adapter_trainer import cli; cli.usage(); print({'torch', 'numpy'} & sys.modules.keys())"
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
    assert time.monotonic() - began < 5, "generous on a busy machine; 0.1 s on a quiet one"
