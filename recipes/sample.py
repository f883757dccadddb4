# /// script
# dependencies = ["optimal-sampling-trl"]
# ///
r"""Offline sampling: completions of a data set's prompts from the mixture, with their records, into Parquet shards.

On the embedded pair (no download; makes the pair first):

    python recipes/pair.py --folder output/pair
    python recipes/sample.py --config recipes/sample.yaml

On models of the Hub, with vLLM on a GPU:

    python recipes/sample.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct \
        --dataset_name trl-lib/DeepMath-103K --max_samples 10000 --n 4 --max_tokens 1024 \
        --engine_arguments '{"dtype": "bfloat16"}' --output_dir output/rollouts

A run that was stopped, killed or out of disk goes on when the same command is given again. `sft.py` trains on what
this writes; `optimal_sampling_trl.load_rollouts` and `datasets.load_dataset` read it. `--help` lists all flags, which
may stand in a YAML file, `--config`. `--no_use_tqdm` is quiet.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import ScriptArguments, TrlParser

from common import load_data
from optimal_sampling_trl import Sampling, sample_to_folder
from optimal_sampling_trl.trainers import SamplerArguments


@dataclass
class SampleArguments(ScriptArguments):
    """The prompts to sample, their number, and the folder; see `sample_to_folder` and `Sampling`."""

    model_name_or_path: str = field(default="", metadata={"help": "Folder or model id of the student."})
    output_dir: str = field(default="output/rollouts", metadata={"help": "Folder of the shards; made if need be."})
    max_samples: int | None = field(default=None, metadata={"help": "Take the first so many prompts alone."})
    n: int = field(default=1, metadata={"help": "Completions of each prompt."})
    seed: int = field(default=0, metadata={"help": "Of the whole run; each rollout gets one of its own from it."})
    batch_size: int = field(default=1024, metadata={"help": "Rollouts in a shard: what a kill can cost."})
    max_tokens: int = field(default=100, metadata={"help": "Most tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Acts on both models before alpha is solved."})
    top_p: float = field(default=1.0, metadata={"help": "Keep the likeliest tokens up to this mass; 1 keeps all."})
    top_k: int = field(default=-1, metadata={"help": "Keep so many likeliest tokens; -1 keeps all."})
    min_p: float = field(default=0.0, metadata={"help": "Keep tokens above this share of the likeliest's."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Divides the logits of tokens seen before."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end a completion."})
    use_tqdm: bool = field(default=True, metadata={"help": "Show tokens/s, mean alpha and the time left."})

    def prompts(self) -> Any:
        """The prompts that the flags name."""
        data = load_data(self, evaluate=False)["train_dataset"]
        if self.max_samples is None:
            return data
        return data.take(min(self.max_samples, len(data)) if hasattr(data, "__len__") else self.max_samples)

    def sampling(self) -> Sampling:
        """Settings of the draws."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(self.stop),
        )


if __name__ == "__main__":
    script, pair = TrlParser((SampleArguments, SamplerArguments)).parse_args_and_config()
    if not script.model_name_or_path:
        raise SystemExit("`--model_name_or_path` is missing; wanted the student's folder or model id.")
    prompts, sampling = script.prompts(), script.sampling()
    with pair.sampler(script.model_name_or_path) as sampler:
        folder = sample_to_folder(
            sampler,
            prompts,
            script.output_dir,
            n=script.n,
            sampling=sampling,
            seed=script.seed,
            batch_size=script.batch_size,
            use_tqdm=script.use_tqdm,
        )
    print(f"The rollouts are in {folder}; {folder / 'README.md'} says what they are.")
