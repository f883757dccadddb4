"""The command `optimal-sampling`: it lists the commands and hands the words to the one that is named."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..options import unknown_option
from .refusals import refusals

PROGRAM = "optimal-sampling"
FOLDER = Path(__file__).with_name("commands")


def commands() -> dict[str, str]:
    """Return the first line of each command, by its name. Nothing is imported: help comes at once."""
    files = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    return {path.stem: _first_line(path) for path in files}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def usage() -> str:
    """Return the help of the program."""
    listed = "\n".join(f"  {name:8} {line}" for name, line in commands().items())
    return (
        f"usage: {PROGRAM} COMMAND [--config FILE.yaml] [flags]\n\n{listed}\n\n"
        f"`{PROGRAM} COMMAND --help` lists the flags of a command."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a refusal is one line.

    Args:
        argv: the words after the program's name; by default this process's.
    """
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from .. import __version__

        print(__version__)
    elif name in commands():
        if name != "serve":  # whose log is what a server is watched by
            _quiet()
        with refusals(f"{PROGRAM} {name}"):
            import_module(f".commands.{name}", __package__).run(words)
    else:
        with refusals(PROGRAM):
            raise ValueError(unknown_option("command", name, commands()))


def _quiet() -> None:
    from ..backends.vllm.launch import quiet

    quiet()  # before TRL is imported, which imports vLLM


if __name__ == "__main__":
    main()
