"""`ip-adapter check`: what is wrong with rows and pictures and, beside a base model, which captions it cuts."""

from __future__ import annotations

from dataclasses import replace

from ip_adapter_trainer.core.errors import Problem
from ip_adapter_trainer.loading.base import load_tokenizers
from ip_adapter_trainer.loading.config import BaseConfig, FoundConfig, part_of
from ip_adapter_trainer.prepare import check_report as rows
from ip_adapter_trainer.prepare.check_config import CheckConfig
from ip_adapter_trainer.prepare.cut import cut_captions


def check(config: CheckConfig) -> rows.CheckReport:
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
        return rows.check(config)
    tokenizers = load_tokenizers(name, part_of(config, BaseConfig))  # before hours of reading pictures
    report = rows.check(config)
    return replace(report, captions=str(cut_captions(report.manifest, tokenizers)))
