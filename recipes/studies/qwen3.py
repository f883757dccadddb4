# /// script
# dependencies = [
#     "optimal-sampling-trl[vllm]", "torch==2.11.0", "transformers==5.17.0", "trl==1.16.0", "vllm==0.26.0",
#     "accelerate==1.15.0", "datasets==5.2.0", "huggingface-hub==1.33.0", "math-verify==0.9.0"
# ]
# ///
"""Qwen3-1.7B-Base taught by Qwen3-8B, with the settings of TRB and of MENTOR, three seeds each and an evaluation.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/studies/qwen3.py       # the Hub's models
    python recipes/studies/qwen3.py --shapes --steps 1                   # tiny models of these families, on a CPU

Not run with weights: `--shapes` alone was. Beside each arm stands the same trainer on the student's rollouts alone. A
line of output/qwen3/runs.jsonl for each run: right answers before and after, on MATH-500.

The presets `trb` and `mentor` hold what their sources set (docs/presets.md says where each was read, and what it
leaves out). TRB's batch, rate and length are the paper's. MENTOR's are those of Jiangzs1028/MENTOR@f9b4fb5: 128
prompts of 8 + 4 completions, the rate and the decay of weights (examples/config.yaml:12 and 49-52), and the length
(examples/train.sh:17-25). This script's own are the models, the data set of all arms, TRB's warm-up, and MENTOR's
number of updates: the source sets 15 epochs of other prompts. The source makes two updates of each batch of rollouts,
and counts batches; here there is one, so that the preset's 120 updates are as many batches as the source's.

The packages' versions are those of this project's runs on H200s and of its constraints.txt; math-verify's is the
latest that was seen. The revisions are those that public repositories pin; the Hub itself was not asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl.rewards import accuracy_reward

import optimal_sampling_trl
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator, Sampling
from optimal_sampling_trl.demo.pair import make_tokenizer
from optimal_sampling_trl.rollouts.request import Request


class Pinned(NamedTuple):
    """A model or a data set on the Hub, and the commit that is taken."""

    name: str
    revision: str


TEACHER = Pinned("Qwen/Qwen3-8B", "b968826d9c46dd6066d109eabc6255188de91218")
STUDENT = Pinned("Qwen/Qwen3-1.7B-Base", "ea980cb0a6c2ae4b936e82123acc929f1cec04c1")
TRAIN = Pinned("trl-lib/DeepMath-103K", "066c50a88d4e14cefc056e31111db2dba17f6c68")
TEST = Pinned("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")


class Arm(NamedTuple):
    """A trainer, what it sets beside the preset of that name, and completions of an update."""

    trainer: str
    preset: str | None
    settings: dict[str, Any]
    completions: int


TRB = {"learning_rate": 1e-5, "max_steps": 400, "max_completion_length": 7168, "warmup_steps": 5}
MENTOR = {
    "learning_rate": 1e-6, "weight_decay": 0.01, "max_steps": 240, "max_completion_length": 8192,
    "num_generations": 12,
}  # fmt: skip
ARMS = {
    "trb": Arm("Distillation", "trb", TRB, 256),
    "distillation": Arm("Distillation", None, TRB | {"beta": 1.0}, 256),
    "mentor": Arm("GRPO", "mentor", MENTOR, 128 * 12),
    "grpo": Arm("GRPO", None, MENTOR | {"positive_only": "none"}, 128 * 12),
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


def fetch(model: Pinned) -> str:
    """Download a model at its commit, and return the folder: engines take a revision of the teacher alone."""
    return snapshot_download(model.name, revision=model.revision)


def data(shapes: bool) -> tuple[Dataset, Dataset]:
    """Prompts and solutions to train on, and to be asked at the end."""
    if shapes:
        rows = Dataset.from_list([{"prompt": f"{number}=", "solution": str(number)} for number in range(96)])
        return rows, rows.select(range(4))
    train = load_dataset(TRAIN.name, split="train", revision=TRAIN.revision).select_columns(["prompt", "solution"])
    test = load_dataset(TEST.name, split="test", revision=TEST.revision)
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
        "logging_steps": 1, "lr_scheduler_type": "constant_with_warmup",
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
    models = make_shapes(options.output) if options.shapes else (fetch(TEACHER), fetch(STUDENT))
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
