"""The start of a command in several processes, by accelerate, as the `trl` command does it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..options import unknown_option
from .parser import Parser, apart

PROFILE = "--accelerate_config"
"""The flag of a profile: a name of TRL's, or a file that `accelerate config` wrote."""


def launch_flags() -> set[str]:
    """Return the flags of `accelerate launch`, and the one of a profile."""
    return {*launch_command_parser()._option_string_actions, PROFILE}


def profiles() -> list[str]:
    """Return the names of the profiles that come with TRL, such as `fsdp2`."""
    return sorted(path.name.removesuffix(".yaml") for path in files("trl.accelerate_configs").iterdir())


def launch_words(parser: Parser, words: Sequence[str]) -> list[str]:
    """Return accelerate's words among those that a command does not know, with a profile's name as its file.

    Args:
        parser: the command's.
        words: those that it did not read.

    Raises:
        ValueError: on a flag that neither knows, naming the nearest, and on a profile that does not exist.
    """
    words = apart(words, PROFILE)
    parser.refuse(words, launch_flags())
    if PROFILE in words:
        at = words.index(PROFILE) + 1
        name = words[at] if at < len(words) else ""
        if name not in profiles() and not Path(name).is_file():
            parser.error(unknown_option(f"profile of `{PROFILE}`", name, profiles()))
    return resolve_accelerate_config_argument(words)


def needs_launch() -> bool:
    """Tell whether several processes are due without a flag: of several GPUs, or of the user's own configuration."""
    return torch.cuda.device_count() > 1 or Path(default_config_file).is_file()


def launch(module: str, launcher: Sequence[str], words: Sequence[str]) -> None:
    """Run a module in the processes that accelerate starts, and wait for them.

    Args:
        module: the module's full name, as `python -m` takes it.
        launcher: accelerate's flags.
        words: the module's own command line.
    """
    launch_command(launch_command_parser().parse_args([*launcher, "--module", module, *words]))
