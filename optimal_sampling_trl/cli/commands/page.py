"""Write rollouts that `sample` saved as one HTML page, every token with its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

from ...options import check_whole
from ...page import write_page
from ...rollouts.folder import RolloutFolder, iterate_rollouts
from ..parser import Parser


@dataclass
class PageArguments:
    """The page, and the rollouts that it shows."""

    output: str = field(default="page.html", metadata={"help": "The file to write.", "aliases": ["-o"]})
    title: str = field(default="Rollouts", metadata={"help": "Heading of the page."})
    most: int = field(default=2000, metadata={"help": "Show only this many rollouts, the first ones."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or model id of the tokenizer; by default the student's of the run."}
    )


def run(words: Sequence[str]) -> None:
    """Write the page of a folder.

    Args:
        words: the folder that `sample` wrote, and flags.
    """
    parser = Parser((PageArguments,), "optimal-sampling page", __doc__ or "")
    parser.usage = "%(prog)s FOLDER [-o page.html] [flags]"
    parser.add_argument("folder", help="folder that `optimal-sampling sample` wrote")
    script, named = parser.read(words)
    with parser.refusing():
        check_whole("page", "most", script.most, 1)
        settings = RolloutFolder(named.folder).read_run()["settings"]
        rollouts = list(islice(iterate_rollouts(named.folder), script.most))
        tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or settings["model_theta"])
        path = write_page(Path(script.output), rollouts, tokenizer, title=script.title)
    print(f"{len(rollouts)} rollouts are in {path}.")
