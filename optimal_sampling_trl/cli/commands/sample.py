"""Sample completions of a data set's prompts from the mixture, with their records, into Parquet.

A run that was stopped, killed or out of disk goes on when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ScriptArguments

from ...options import check_whole
from ...rollouts.dense import Dense
from ...rollouts.request import Sampling
from ...sampling_run import sample_to_folder
from ...trainers import SamplerArguments
from ..data import load_data
from ..parser import Parser
from ..unread import warn_of_unread_flags


@dataclass
class SampleArguments(ScriptArguments):
    """The prompts to sample, their number, and the folder; see `sample_to_folder` and `Sampling`."""

    model_name_or_path: str = field(default="", metadata={"help": "Folder or model id of the student."})
    output_dir: str = field(default="output/rollouts", metadata={"help": "Folder of the shards; made if missing."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only this many prompts, the first ones."})
    n: int = field(default=1, metadata={"help": "Completions of each prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of the whole run, from which each rollout gets its own."})
    batch_size: int = field(default=1024, metadata={"help": "Rollouts in a shard: what a kill can cost."})
    max_tokens: int = field(default=100, metadata={"help": "Most tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Acts on both models before alpha is solved."})
    top_p: float = field(default=1.0, metadata={"help": "Keep the likeliest tokens up to this mass; 1 keeps all."})
    top_k: int = field(default=-1, metadata={"help": "Keep this many of the likeliest tokens; -1 keeps all."})
    min_p: float = field(
        default=0.0, metadata={"help": "Keep tokens with at least this share of the likeliest token's probability."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Divides the logits of tokens seen before."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end a completion."})
    dense_scalars: list[str] = field(default_factory=list, metadata={"help": "Exact numbers to keep for each token."})
    dense_top_k: int = field(default=0, metadata={"help": "Likeliest tokens of each model to keep for each token."})
    use_tqdm: bool = field(default=True, metadata={"help": "Show tokens/s, mean alpha and the time left."})

    def prompts(self) -> Any:
        """Return the prompts that the flags name."""
        data = load_data(self, evaluate=False)["train_dataset"]
        if self.max_samples is None:
            return data
        check_whole("sample", "max_samples", self.max_samples, 1, "Drop it for all prompts.")
        return data.take(min(self.max_samples, len(data)) if hasattr(data, "__len__") else self.max_samples)

    def sampling(self) -> Sampling:
        """Return the settings of the draws."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop or ()),
        )

    def dense(self) -> Dense | None:
        """Return the dense records that are wanted."""
        asked = self.dense_scalars or self.dense_top_k
        return Dense(tuple(self.dense_scalars or ()), self.dense_top_k) if asked else None


def run(words: Sequence[str]) -> None:
    """Sample what a command line asks for.

    Args:
        words: the command line after the command.
    """
    parser = Parser((SamplerArguments, SampleArguments), "optimal-sampling sample", __doc__ or "")
    pair, script = parser.read(words)
    if not script.model_name_or_path:
        raise ValueError("`--model_name_or_path` is missing; wanted the student's folder or model id.")
    with parser.refusing():
        prompts, sampling, dense = script.prompts(), script.sampling(), script.dense()
        warn_of_unread_flags(parser.named, script)
        with pair.sampler(script.model_name_or_path) as sampler:
            folder = sample_to_folder(
                sampler,
                prompts,
                script.output_dir,
                n=script.n,
                sampling=sampling,
                dense=dense,
                seed=script.seed,
                batch_size=script.batch_size,
                use_tqdm=script.use_tqdm,
            )
    print(f"The rollouts are in {folder}; {folder / 'README.md'} says what they are.")
    print(f"A page of them: optimal-sampling page {folder} -o page.html")
