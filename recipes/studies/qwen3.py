# /// script
# dependencies = ["optimal-sampling-trl[vllm]", "math-verify"]
# ///
"""Qwen3-1.7B-Base taught by Qwen3-8B, with the settings of TRB and of MENTOR, three seeds each and an evaluation.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/studies/qwen3.py       # the Hub's models
    python recipes/studies/qwen3.py --shapes --steps 1                   # tiny models of these families, on a CPU

Not run with weights: `--shapes` alone was. The presets `trb` and `mentor` hold what their sources set
(docs/presets.md says where each was read, and what it leaves out); the batch, rate and length of TRB are the paper's.
MENTOR's rate and length and the data set of all arms are this script's. Beside each stands the same trainer on the
student's rollouts alone. A line of output/qwen3/runs.jsonl for each run: right answers before and after, on MATH-500.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl.rewards import accuracy_reward

import optimal_sampling_trl
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, Sampling
from optimal_sampling_trl.demo.pair import make_tokenizer
from optimal_sampling_trl.rollouts.request import Request

TEACHER, STUDENT = "Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B-Base"
TRAIN, TEST = "trl-lib/DeepMath-103K", "HuggingFaceH4/MATH-500"


class Arm(NamedTuple):
    """A trainer, what it sets beside the preset of that name, and completions of an update."""

    trainer: str
    preset: str | None
    settings: dict[str, Any]
    completions: int


TRB = {"learning_rate": 1e-5, "max_steps": 400, "max_completion_length": 7168}
MENTOR = {"learning_rate": 1e-6, "max_steps": 240, "max_completion_length": 4096, "num_generations": 12}
ARMS = {
    "trb": Arm("Distillation", "trb", TRB, 256),
    "distillation": Arm("Distillation", None, TRB | {"beta": 1.0}, 256),
    "mentor": Arm("GRPO", "mentor", MENTOR, 384),
    "grpo": Arm("GRPO", None, MENTOR | {"positive_only": "none"}, 384),
}


def make_shapes(folder: Path) -> tuple[str, str]:
    """Write a teacher and a student of Qwen3's kind with random weights that speak the embedded pair's characters."""
    tokenizer = make_tokenizer()
    for name, width in (("teacher", 64), ("student", 32)):
        config = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "teacher"), str(folder / "student")


def data(shapes: bool) -> tuple[Dataset, Dataset]:
    """Prompts and solutions to train on, and to be asked at the end."""
    if shapes:
        rows = Dataset.from_list([{"prompt": f"{number}=", "solution": str(number)} for number in range(96)])
        return rows, rows.select(range(4))
    train = load_dataset(TRAIN, split="train").select_columns(["prompt", "solution"])
    test = load_dataset(TEST, split="test")
    return train, test.map(
        lambda row: {"prompt": [{"role": "user", "content": row["problem"]}], "solution": row["answer"]},
        remove_columns=test.column_names,
    )


def right(completions: Sequence[Any], solution: Sequence[str], **columns: Any) -> list[float]:
    """TRL's reward for a right answer to chats, 0 where a solution cannot be read; of plain texts, an equal one."""
    if isinstance(completions[0], str):
        return [float(text == wanted) for text, wanted in zip(completions, solution, strict=True)]
    return [found or 0.0 for found in accuracy_reward(list(completions), list(solution))]


def examine(trainer: Any, rows: Dataset) -> float:
    """The share of questions that a sample of the student answers rightly, at temperature 1."""
    tokenizer, generation = trainer.processing_class, trainer.vllm_generation
    prompts = [
        tokenizer(prompt).input_ids
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in rows["prompt"]
    ]
    sampling = Sampling(max_tokens=trainer.args.max_completion_length)
    generation.sync_weights()
    owner = generation if hasattr(generation, "backend") else generation.llm  # transformers, or vLLM
    rollouts = owner.backend.generate([Request(ids, ids, Mixture.theta_only(), sampling) for ids in prompts])
    plain = isinstance(rows["prompt"][0], str)
    texts = [rollout.text if plain else [{"content": rollout.text}] for rollout in rollouts]
    return sum(right(texts, rows["solution"])) / len(rows)


def build(arm: Arm, models: tuple[str, str], seed: int, options: argparse.Namespace, train: Dataset) -> Any:
    """The trainer of a run."""
    group = arm.settings.get("num_generations", 1)
    size = group if options.shapes else options.micro_batch
    settings = arm.settings | {
        "output_dir": str(options.output / "trained"), "seed": seed, "preset": arm.preset, "save_strategy": "no",
        "per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "report_to": "none",
        "logging_steps": 1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5,
    }  # fmt: skip
    if options.shapes:
        settings |= {"use_cpu": True, "bf16": False, "max_completion_length": 6}
    else:
        settings |= {"bf16": True, "gradient_accumulation_steps": arm.completions // (size * options.processes)}
    settings |= {"max_steps": options.steps} if options.steps else {}
    share = {} if arm.preset else {"theta_fraction": 1.0}
    mixture = Mixture.preset(arm.preset) if arm.preset else Mixture()
    backend = "transformers" if options.shapes else "vllm"
    trainer, config = (getattr(optimal_sampling_trl, f"{arm.trainer}{part}") for part in ("Trainer", "Config"))
    return trainer(
        models[1],
        args=config(**settings),
        generator=OptimalSamplingGenerator(models[0], mixture, backend=backend, **share),
        processing_class=AutoTokenizer.from_pretrained(models[1], padding_side="left"),
        train_dataset=train,
        **({"reward_funcs": right} if arm.trainer == "GRPO" else {}),
    )


def main() -> None:
    """Run each arm with each seed; a line of JSON of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--shapes", action="store_true", help="tiny models with random weights, on a CPU")
    parser.add_argument("--steps", type=int, help="updates; by default each arm's")
    parser.add_argument("--micro_batch", type=int, default=4, help="completions of a forward pass (%(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="that accelerate starts (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/qwen3"), help="folder (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    models = make_shapes(options.output) if options.shapes else (TEACHER, STUDENT)
    train, test = data(options.shapes)
    for name, seed in product(options.arms, options.seeds):
        trainer = build(ARMS[name], models, seed, options, train)
        before = examine(trainer, test)
        trainer.train()
        line = {"arm": name, "seed": seed, "steps": trainer.state.global_step, "before": before}
        line |= {"after": examine(trainer, test), "shapes": options.shapes}
        trainer.vllm_generation.close()
        if trainer.accelerator.is_main_process:
            with (options.output / "runs.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
