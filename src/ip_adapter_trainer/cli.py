"""`ip-adapter COMMAND`: parse, dispatch, turn every error into one line what, one line where, one line what to do."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ip_adapter_trainer.core.errors import Problem, Stopped, did_you_mean, first_line
from ip_adapter_trainer.core.log import patient_stderr, say
from ip_adapter_trainer.core.redact import redacted
from ip_adapter_trainer.runtime.signals import interruptible, tell_at_once
from ip_adapter_trainer.storage.disk import as_storage_problem, demand_folder

if TYPE_CHECKING:
    from ip_adapter_trainer.train.config import TrainConfig

COMMANDS = {
    "train": "train an adapter on images and captions",
    "prepare": "encode the images of a training set once, for all later runs",
    "generate": "draw images with an image prompt",
    "evaluate": "score an adapter: CLIP-I and CLIP-T beside scale 0 and shuffled prompts",
    "export": "turn a checkpoint into an adapter file, verified by reloading it",
    "inspect": "tell what an adapter file holds and who can read it",
    "check": "read every row and image of a training set and list the faults",
    "pocket": "write the embedded base model and a training set to try everything on",
    "demo": "train on the embedded base model and score the result, in minutes",
}


def usage() -> str:
    """Return the text of `ip-adapter --help`."""
    lines = ["usage: ip-adapter COMMAND [flags]", "", "Train and use image-prompt adapters (IP-Adapter).", ""]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    more = ["`ip-adapter help COMMAND` lists a command's flags; --debug shows tracebacks; --version tells versions."]
    return "\n".join([*lines, "", *more])


def versions() -> str:
    """Return the text of `ip-adapter --version`: this package, the libraries that it computes with, and Python."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("ip_adapter_trainer", "torch", "diffusers", "transformers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return "\n".join(f"{name} {number}" for name, number in (found | {"python": platform.python_version()}).items())


def _train(argv: Sequence[str], **how: Any) -> int:
    """Train with resolved settings, and write them beside the result."""
    from ip_adapter_trainer.config import parse_train, write_resolved

    config = parse_train(argv, look=look, **how)
    from ip_adapter_trainer.train.run import train

    train(config, write_resolved)
    return 0


def look(config: TrainConfig) -> None:
    """Demand a free output folder; a dry run needs none."""
    if not config.dry_run:
        demand_free(config.output_dir, "--output_dir")


def demand_free(folder: str, flag: str) -> None:
    """Demand a folder that can be created and that no other run writes to, before the minutes that loading takes.

    The folder is claimed once everything is loaded. This check holds its lock for an instant; a claim waits that long.

    Raises:
        Problem: another run holds the folder, or it cannot be created.
    """
    from ip_adapter_trainer.storage.staging import LOOK_PATIENCE_S, lock, was_claimed

    if os.environ.get("RANK", "0") == "0":
        demand_folder(Path(folder))
        if was_claimed(Path(folder)):
            lock(Path(folder), flag, LOOK_PATIENCE_S).release()


def _prepare(argv: Sequence[str]) -> int:
    from ip_adapter_trainer.config import parse
    from ip_adapter_trainer.prepare.config import PrepareConfig

    config = parse(PrepareConfig, argv, prog="ip-adapter prepare")
    demand_free(config.prepared_dir, "--prepared_dir")
    from ip_adapter_trainer.prepare.run import prepare

    say(str(prepare(config)))
    return 0


# Commands that print what their function returns: the places of their settings class and of the function.
_PRINTING = {
    "generate": ("evaluate.config:GenerateConfig", "evaluate.generate:generate"),
    "evaluate": ("evaluate.config:EvaluateConfig", "evaluate.scores:evaluate"),
    "export": ("file_config:ExportConfig", "export:export"),
    "inspect": ("file_config:InspectConfig", "inspection:inspect"),
    "check": ("prepare.check_config:CheckConfig", "prepare.check:check"),
    "pocket": ("pocket.config:PocketConfig", "pocket.write:pocket"),
    "demo": ("pocket.config:DemoConfig", "demo:demo"),
}


def _print(command: str, argv: Sequence[str]) -> int:
    """Run a command and print what it returns; its function is imported only once its flags are known to be right."""
    from ip_adapter_trainer.config import parse

    settings, function = _PRINTING[command]
    config = parse(_named(settings), argv, prog=f"ip-adapter {command}")
    result = _named(function)(config)
    for line in result if isinstance(result, list) else [result]:
        print(line)
    return getattr(result, "exit_code", 0)


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"ip_adapter_trainer.{module}"), name)


_NO_MEMORY = """the device's memory is not enough: {}
  to do: free it of other programs, or take fewer images at once: without --train_batch_size, train chooses how many;
  --low_memory 8, 12 or 24 and --quantize need less"""

RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train, "prepare": _prepare, **{name: partial(_print, name) for name in _PRINTING},
}  # fmt: skip


def guarded(run: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and return its exit code; print each error in three lines, with `--debug` also the traceback."""

    def work() -> int:
        """Run the command if its flags hold no secrets."""
        from ip_adapter_trainer.core.settings import demand_no_secrets

        demand_no_secrets(argv)
        return run([a for a in argv if a != "--debug"])

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _ended(work, debug="--debug" in argv)


@patient_stderr()
def _ended(work: Callable[[], int], *, debug: bool = False) -> int:
    """Do some work, print whatever it raises as an error, and return the exit code.

    If the reader of its output closes the pipe, as `head` does after ten lines, it ends silently with 141.
    """
    try:
        with interruptible(), as_storage_problem():
            try:
                return work()
            finally:
                print(end="", flush=True)  # output that is refused raises here, not at the interpreter's exit
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt as asked:
        tell_at_once("stopped")
        return 128 + (asked.args[0] if asked.args else signal.SIGINT)
    except Problem as problem:
        if debug:
            print(redacted(traceback.format_exc()), file=sys.stderr)
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 141
        if debug:
            print(redacted(traceback.format_exc()), file=sys.stderr)
        if type(error).__name__ == "OutOfMemoryError":  # torch's own, which takes a second to import
            print(f"error: {_NO_MEMORY.format(first_line(error))}", file=sys.stderr)
            return 1
        told = f"bug: {type(error).__name__}: {error}\n  to do: run again with --debug and report it"
        print(redacted(told), file=sys.stderr)
        return 1


def _reader_is_gone() -> bool:
    """Return whether nobody reads standard output any more; if so, discard what is still written to it."""
    poll = select.poll()
    poll.register(1, 0)  # errors are reported without being asked for
    if not poll.poll(0):
        return False
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
    return True


def script(variant: str) -> None:
    """Run as a drop-in training script: published flags from the command line, with `variant` as the default."""

    def run(argv: Sequence[str]) -> int:
        """Train with the published script's defaults for flags that are not given."""
        from ip_adapter_trainer.train.config import PUBLISHED

        return _train(argv, prog=Path(sys.argv[0]).name, defaults=PUBLISHED | {"variant": variant})

    _leave(guarded(run, sys.argv[1:]))


def main() -> None:
    """Run `ip-adapter` with the command line's arguments, and exit."""
    argv = sys.argv[1:]
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    _leave(guarded(RUN[argv[0]], argv[1:]) if argv and argv[0] in RUN else _ended(lambda: _without_command(argv)))


def _without_command(argv: Sequence[str]) -> int:
    """Print the version or the usage, which need no command; nothing heavy is imported."""
    asked = argv[0] if argv else "help"
    if asked in ("-V", "--version"):
        print(versions())
    elif asked in ("-h", "--help", "help"):
        print(usage())
    else:
        raise Problem(f"unknown command {asked!r}", remedy=did_you_mean(asked, [*RUN, "help"]))
    return 0 if argv else 2


def _leave(exit_code: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while exiting, one more Ctrl-C loses nothing
    raise SystemExit(exit_code)
