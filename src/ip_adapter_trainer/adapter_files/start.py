"""The settings with which a model of this trainer takes the weights of an adapter file, if it can."""

from __future__ import annotations

import torch

from ip_adapter_trainer.adapter_files.file import AdapterFile
from ip_adapter_trainer.adapters import Shapes, Variant, shapes_of
from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.core.settings import Part

_LENGTH = 257  # feature vectors of an image, where no card tells it: no weight depends on it


def fitting_config(file: AdapterFile) -> Part:
    """Return the settings of a projector that has the file's names and shapes.

    Raises:
        Problem: no projector of this trainer has them.
    """
    config = file.config()
    remedy = "take another adapter file, or train a new adapter"
    try:
        built = _built(file.variant, config, file)
    except Problem as problem:
        raise problem.but(where=str(file.path), remedy=remedy) from problem
    for name in sorted(built.keys() | file.shapes.keys()):
        mine, theirs = built.get(name), file.shapes.get(name)
        if mine != theirs:
            what = f"image_proj.{name} has the shape {_text(theirs)}, and {_text(mine)} in a projector of its kind"
            raise Problem(what, where=str(file.path), remedy=remedy)
    return config


def flags_to_fit(file: AdapterFile, built: Shapes | None = None) -> list[str]:
    """Return the flags that give a projector the sizes of a file that `fitting_config` accepts.

    They are told beside `built`, shapes of a projector of the same variant; None: those without any flags.
    """
    kind = file.variant.Config
    mine = file.variant.facts(built or _built(file.variant, kind(), file))
    return [
        f"--{name} {value}" for name, value in file.facts.items() if name in kind.model_fields and mine[name] != value
    ]


def _built(variant: type[Variant], config: Part, file: AdapterFile) -> Shapes:
    """Return the shapes of a projector for the file's widths, built on the meta device, without memory."""
    length = file.card.num_tokens if file.card else _LENGTH
    shapes = {need: (length, file.feature_dim(need)) for need in variant.needs}
    with torch.device("meta"):
        projector = variant.projector(config, shapes, file.facts["context_dim"])
    return shapes_of(projector.state_dict())


def _text(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
