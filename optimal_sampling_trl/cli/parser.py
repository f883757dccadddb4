"""TRL's parser with groups in its help, choices of a YAML file checked, and errors of one line."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..options import shown, unknown_option

CONFIG = "--config"
"""The flag that names a YAML file."""
INSTEAD = {
    **dict.fromkeys(("--student", "--theta", "--model"), "--model_name_or_path"),
    "--dataset": "--dataset_name",
    "--reward": "--reward_funcs",
}
"""Flags that other commands or a user's own words have, and what TRL and this package call them."""
PACKAGES = {"optimal_sampling_trl": "this package", "trl": "TRL", "transformers": "transformers"}
"""Packages whose fields a configuration has, in the order in which the help shows them."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, keeps the lines of a description, and shows each flag by one spelling of two."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown)


class Parser(TrlParser):
    """Reads dataclasses from a command line and the YAML file that it names.

    Args:
        kinds: the dataclasses; the help lists their flags in this order.
        prog: the command, as the help names it.
        description: the first lines of the help.

    Attributes:
        named: the fields that the last command line set, itself or in its YAML file, even to their defaults.
    """

    def __init__(self, kinds: Iterable[Any], prog: str, description: str) -> None:
        super().__init__(
            kinds,
            prog=prog,
            description=description,
            usage="%(prog)s [--config FILE.yaml] [flags]",
            allow_abbrev=False,
            formatter_class=Formatter,
        )
        self.named: frozenset[str] = frozenset()
        self._group_flags()

    def read(self, words: Sequence[str], further: Iterable[str] = ()) -> tuple[Any, ...]:
        """Return the dataclasses that a command line describes.

        Args:
            words: the command line after the command.
            further: fields of the YAML file that something else reads.

        Raises:
            ValueError: on a flag or a value that is not known, or that a dataclass refuses.
        """
        of_file, of_line = self.unread(words)
        self.refuse([*of_line, *(flag for flag in of_file[::2] if flag.removeprefix("--") not in set(further))])
        with self.refusing():
            parsed: Any = self.parse_args_and_config(apart(words, CONFIG), return_remaining_strings=True)
        *found, _ = parsed
        self._check_choices(found)
        self.named = self._named(words)
        return tuple(found)

    def unread(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the words of the YAML file and of the command line that are no flags of this parser's.

        Nothing is built of the flags: a configuration counts processes, which may be started later. `--help` ends the
        process.

        Raises:
            ValueError: on a value that is none of a flag's choices.
        """
        of_file, words = self._of_file(words)
        known = {action.dest for action in self._actions} | {"env"}
        rest = [word for name, value in of_file.items() if name not in known for word in (f"--{name}", str(value))]
        return rest, self.parse_known_args(words)[1]

    def refuse(self, unread: Iterable[str], further: Iterable[str] = ()) -> None:
        """Refuse a word that is neither a flag of `further` nor stands after one.

        Args:
            unread: the words that this parser does not know.
            further: flags that something else reads.

        Raises:
            ValueError: naming the word, and the nearest flag.
        """
        further, before = set(further), ""
        for word in unread:
            name = word.split("=")[0]
            if name.startswith("-") and name not in further:
                flags = [flag for flag in self._option_string_actions if "-" not in flag.removeprefix("--")]
                if (meant := INSTEAD.get(name)) in flags:
                    self.error(f"Unknown flag {name!r}. Did you mean {meant!r}?")
                listed = f"`{self.prog} --help` lists them."
                self.error(unknown_option("flag", name, [CONFIG, *flags, *further], otherwise=listed))
            if not name.startswith("-") and before not in further:
                self.error(
                    f"{word!r} follows no flag that takes it; wanted each value behind its flag, and a YAML file "
                    f"behind `{CONFIG}`."
                )
            before = name

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take a file's values as TRL does; of a flag that takes several, one that is no list is a list of one.

        A text would else be read as a list of its letters. Where texts are wanted, what YAML reads as another value
        is refused: of `no` and `1.0` the text that was meant cannot be told.
        """
        several = {action.dest: action.type for action in self._actions if action.nargs in ("+", "*")}
        lists = {
            name: value if isinstance(value, list) else [value]
            for name, value in config.items()
            if name in several and value is not None
        }
        for name, values in lists.items():
            for value in values if several[name] is str else ():
                if not isinstance(value, str):
                    self.error(f"`{name}` in the YAML file holds {shown(value)}; wanted texts. Put it into quotes.")
        return super().set_defaults_with_config(**{**config, **lists})

    def _of_file(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the flags of the YAML file that a command line names, and the other words of the line."""
        words = apart(words, CONFIG)
        if CONFIG not in words:
            return {}, words
        at = words.index(CONFIG)
        return self._read_file(words[at + 1 : at + 2]), [*words[:at], *words[at + 2 :]]

    def _named(self, words: Sequence[str]) -> frozenset[str]:
        of_file, words = self._of_file(words)
        unset = object()
        known = {action.dest for action in self._actions}
        found, _ = self.parse_known_args(words, argparse.Namespace(**dict.fromkeys(known, unset)))
        return frozenset(name for name in known if name in of_file or getattr(found, name) is not unset)

    def _read_file(self, named: Sequence[str]) -> dict[str, Any]:
        """Return the flags of a YAML file.

        Args:
            named: its path, or nothing.

        Raises:
            ValueError: where it is none.
        """
        if not named:
            self.error(f"`{CONFIG}` stands at the end; wanted the path of a YAML file behind it.")
        try:
            found = yaml.safe_load(Path(named[0]).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"`{CONFIG}` names no YAML file that can be read: {error}")
        if not isinstance(found, dict):
            held = "nothing" if found is None else f"a {type(found).__name__}"
            self.error(
                f"`{CONFIG}` is {named[0]!r}, which holds {held}; wanted a flag without its dashes on each line, such "
                "as `learning_rate: 1.0e-5`."
            )
        return found

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse what the block refuses, in whosever lines, and a file that cannot be used.

        Raises:
            ValueError: with the words of the error.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Refuse a command line, where argparse prints the names of all flags and ends the process.

        Raises:
            ValueError: with the message.
        """
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_option("value", value, map(str, action.choices)))

    def _check_choices(self, found: Sequence[Any]) -> None:
        """Check values of the YAML file, which argparse takes for defaults."""
        for action in self._actions:
            values = [getattr(each, action.dest) for each in found if hasattr(each, action.dest)]
            if action.choices and values and isinstance(values[0], str) and values[0] not in action.choices:
                self.error(unknown_option(f"value of `{action.dest}`", values[0], map(str, action.choices)))

    def _group_flags(self) -> None:
        """Show each dataclass's flags by the package that defines them, this package's first."""
        for kind in self.dataclass_types:
            of_package: dict[str, set[str]] = {package: set() for package in PACKAGES}
            for each in fields(kind):
                of_package.setdefault(_package(kind, each), set()).add(each.name)
            for package, names in of_package.items():
                actions = [action for action in self._actions if action.dest in names]
                if actions:
                    group = self.add_argument_group(f"{kind.__name__}, flags of {PACKAGES.get(package, package)}")
                    for action in actions:
                        self._optionals._group_actions.remove(action)
                        group._group_actions.append(action)


def apart(words: Iterable[str], flag: str) -> list[str]:
    """Return the words with the value of `flag=value` as a word of its own, which is how TRL looks for it."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]


def _package(kind: type, each: Field[Any]) -> str:
    """Return the package of the class that defines a dataclass's field; an inherited field is the same object."""
    owners = [base for base in kind.__mro__ if vars(base).get("__dataclass_fields__", {}).get(each.name) is each]
    return owners[-1].__module__.split(".")[0]
