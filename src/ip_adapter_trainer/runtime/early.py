"""Tell before a command's heavy imports what is wrong with its folder: it cannot be made, or another run is writing it.

The claim comes when all is loaded; without a look beforehand, a second start would take as long as loading does to be
refused. The look holds the lock for an instant only, for which a claim waits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ip_adapter_trainer.storage.disk import demand_folder
from ip_adapter_trainer.storage.staging import lock, was_claimed

FOLDERS = {"output_dir": "sd-ip_adapter", "prepared_dir": "prepared"}  # settings, and what they are by default


def demand_free(argv: Sequence[str], setting: str) -> None:
    """Looks at a command's folder as its flags, or the settings file that they name, tell it.

    Args:
        argv: flags, not yet parsed; what is wrong with them is left for the parser to tell.
        setting: one of `FOLDERS`.

    Raises:
        Problem: another run holds the folder, or it cannot be made.
    """
    if os.environ.get("RANK", "0") != "0" or {"-h", "--help"}.intersection(argv):
        return
    settings = _peek(argv, setting)
    if not settings.get("dry_run"):
        folder = Path(str(settings.get(setting, FOLDERS[setting])))
        demand_folder(folder)
        if was_claimed(folder):
            lock(folder, f"--{setting}").release()


def _peek(argv: Sequence[str], setting: str) -> Mapping[str, Any]:
    peek = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for name in ("config", setting):
        peek.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    peek.add_argument("--dry_run", "--dry-run", action="store_true")
    try:
        given = vars(peek.parse_known_args(list(argv))[0])
    except argparse.ArgumentError:
        return {}
    if "config" not in given:
        return given
    from ip_adapter_trainer.storage.settings_file import read_yaml

    return read_yaml(given["config"]) | given
