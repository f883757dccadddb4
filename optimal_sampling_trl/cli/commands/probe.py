"""Sample a few prompts from a pair in six ways, ask the reward about each, and print the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ...options import check_whole
from ...probe import probe, probe_json, probe_page, probe_text
from ...trainers.arguments import PairArguments
from ..data import load_data
from ..parser import Parser
from ..training import RewardArguments
from ..unread import warn_of_unread_flags


@dataclass
class ProbeArguments(RewardArguments):
    """The prompts and the reward that a probe takes; see `probe`."""

    model_name_or_path: str = field(default="", metadata={"help": "Folder or model id of the student."})
    prompts: int = field(default=64, metadata={"help": "Take only this many prompts, the first ones."})
    n: int = field(default=8, metadata={"help": "Completions of each prompt, in each way of sampling."})
    max_tokens: int = field(default=256, metadata={"help": "Most tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Acts on both models before alpha is solved."})
    accept: float | None = field(default=None, metadata={"help": "Smallest reward that counts; default: any above 0."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    output: str | None = field(
        default=None,
        metadata={"help": "File for the numbers: JSON where its name ends so, else a page.", "aliases": ["-o"]},
    )


def run(words: Sequence[str]) -> None:
    """Probe the pair that a command line names.

    Args:
        words: the command line after the command.
    """
    parser = Parser((PairArguments, ProbeArguments), "optimal-sampling probe", __doc__ or "")
    pair, script = parser.read(words)
    if not script.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing; wanted the student's folder or model id.")
    rewards = script.rewards()
    if len(rewards) != 1:
        raise ValueError(f"`--reward_funcs` names {len(rewards)} functions; wanted one, which says what a success is.")
    check_whole("probe", "prompts", script.prompts, 1)
    warn_of_unread_flags(parser.named, script)
    rows = list(islice(load_data(script, evaluate=False)["train_dataset"], script.prompts))
    with pair.sampler(script.model_name_or_path) as sampler:
        found = probe(
            sampler,
            rows,
            rewards[0],
            n=script.n,
            max_tokens=script.max_tokens,
            temperature=script.temperature,
            accept=script.accept,
            seed=script.seed,
        )
    print(probe_text(found))
    if script.output:
        path = Path(script.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((probe_json if path.suffix == ".json" else probe_page)(found), encoding="utf-8")
        print(f"The numbers are in {path}.")
