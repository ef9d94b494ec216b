"""The house keeps its own rules: ranks of imports, lengths of files and functions, no setting that nothing reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ip_adapter_trainer.adapters import VARIANTS
from ip_adapter_trainer.config import compose, groups_of
from ip_adapter_trainer.evaluate.config import EvaluateConfig, GenerateConfig
from ip_adapter_trainer.families import FAMILIES
from ip_adapter_trainer.file_config import ExportConfig, InspectConfig
from ip_adapter_trainer.pocket.config import DemoConfig, PocketConfig
from ip_adapter_trainer.prepare.check_config import CheckConfig
from ip_adapter_trainer.prepare.config import PrepareConfig

PACKAGE = Path(__file__).parents[1] / "src" / "ip_adapter_trainer"
RANKS = {
    "core": 0, "flags": 1, "storage": 1, "nn": 1, "diffusion": 1, "runtime": 2, "images": 2, "encoders": 2,
    "adapters": 3, "families": 3, "manifest": 3, "adapter_files": 4, "cache": 4, "feed": 5, "model": 5, "card": 6,
    "loading": 6, "evaluate": 7, "file_config": 7, "pocket": 7, "prepare": 7, "export": 8, "inspection": 8, "train": 8,
    "config": 9, "demo": 10, "cli": 11, "__main__": 12, "__init__": 12,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (n.split(".")[1] for n in names if n.startswith("ip_adapter_trainer."))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_to_a_lower_rank_only(file: Path) -> None:
    own = unit(file)
    wrong = [name for name in imports(file) if name != own and RANKS[name] >= RANKS[own]]
    assert not wrong, f"{own} (rank {RANKS[own]}) imports {wrong}"


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


@pytest.mark.parametrize("family", [*FAMILIES, "auto"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_setting_of_a_run_is_in_exactly_one_group_of_its_help(variant: str, family: str) -> None:
    kind = compose(variant, family)
    groups = groups_of(variant, family)
    listed = [name for names in groups.values() for name in names if name != "config"]
    assert sorted(listed) == sorted(kind.model_fields) and all(groups.values())
    assert groups[f"Variant {variant}"].keys() == VARIANTS[variant].Config.model_fields.keys()
