# /// script
# dependencies = ["optimal-sampling-trl", "peft", "math-verify"]
# ///
r"""Supervised fine-tuning of the student on rollouts that `sample.py` wrote, those with a high reward if asked for.

On the embedded pair (no download; makes the pair and the rollouts first):

    python recipes/pair.py --folder output/pair
    python recipes/sample.py --config recipes/sample.yaml
    accelerate launch recipes/sft.py --config recipes/sft.yaml

On models of the Hub, on the rollouts with the right answer (the data set has the column that the reward reads):

    accelerate launch recipes/sft.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --rollouts output/rollouts \
        --reward_funcs trl.rewards.accuracy_reward --dataset_name trl-lib/DeepMath-103K \
        --learning_rate 1e-5 --bf16 --output_dir output/sft

`--help` lists all flags: TRL's and this script's. They may stand in a YAML file, `--config`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from optimal_sampling_trl.cli.data import load_data
from optimal_sampling_trl.cli.refusals import refusals
from optimal_sampling_trl.cli.training import RewardArguments, load_options
from optimal_sampling_trl.losses import accept_rewards
from optimal_sampling_trl.pairing import is_chat


@dataclass
class RolloutArguments(RewardArguments):
    """The rollouts to learn from."""

    rollouts: str = field(default="output/rollouts", metadata={"help": "Folder that sample.py wrote."})
    min_reward: float = field(
        default=1.0, metadata={"help": "Keep rollouts whose rewards sum to at least this; without rewards all."}
    )


def rewards(rows: Dataset, script: RolloutArguments, tokenizer: Any) -> list[float]:
    """The sum of the reward functions for each rollout.

    The prompts and further columns that they read are those of `--dataset_name`, the data set that was sampled from;
    where it is not named the prompts are the teacher's, decoded.
    """
    completions: list[Any] = list(rows["text"])
    columns: dict[str, list[Any]] = {}
    if script.dataset_name:
        source = load_data(script, evaluate=False)["train_dataset"].select(rows["prompt_index"])
        columns = {name: list(source[name]) for name in source.column_names}
    prompts = columns.pop("prompt", None) or tokenizer.batch_decode(list(rows["prompt_ids"]), skip_special_tokens=True)
    if is_chat(prompts[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns["completion_ids"] = list(rows["completion_ids"])
    scores = [function(prompts=prompts, completions=completions, **columns) for function in script.rewards()]
    return [sum(score or 0.0 for score in each) for each in zip(*scores)]


def training_data(script: RolloutArguments, tokenizer: Any) -> Dataset:
    """Return prompts and completions: token ids as they were sampled, and labels on the completion alone."""
    shards = str(Path(script.rollouts) / "data" / "*.parquet")
    rows = load_dataset("parquet", data_files=shards, split="train")
    count = len(rows)
    if script.reward_funcs:
        scores = rewards(rows, script, tokenizer)
        accepted = accept_rewards(torch.tensor(scores, dtype=torch.double), script.min_reward)
        rows = rows.select(accepted.nonzero().flatten().tolist())
    if not len(rows):
        raise SystemExit(f"None of {count} rollouts has a reward of {script.min_reward}; lower `--min_reward`.")
    print(f"{len(rows)} of {count} rollouts are learned from.")
    return rows.map(
        lambda row: {
            "input_ids": row["theta_prompt_ids"] + row["completion_ids"],
            "labels": [-100] * len(row["theta_prompt_ids"]) + row["completion_ids"],
        },
        remove_columns=rows.column_names,
    )


@refusals("sft.py")
def main() -> None:
    """Train on the rollouts."""
    script, training, model = TrlParser((RolloutArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    options = load_options(model, training)
    trainer = SFTTrainer(
        args=training, train_dataset=training_data(script, tokenizer), processing_class=tokenizer, **options
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"The model is in {training.output_dir}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
