"""When an engine's copy of the student is pushed: whenever the trained one has changed, and never else.

The engine here is the transformers backend with a student of its own, loaded from the folder: seconds where vLLM takes
a minute. Each batch is held against the trained module by the guard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.training import TEXTS, make_trainer
from optimal_sampling_trl.backends.transformers import TransformersBackend
from optimal_sampling_trl.trainers import mixture_trainer
from optimal_sampling_trl.trainers.engines.live import LiveGeneration
from optimal_sampling_trl.trainers.engines.push import PushedGeneration

QUICK: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.05,
    "max_completion_length": 4,
    "per_device_eval_batch_size": 4,
}


class CopyGeneration(PushedGeneration):
    """A backend with its own student."""

    backend: TransformersBackend
    engine = LiveGeneration.engine
    sleeps = False
    generate = LiveGeneration.generate
    types = LiveGeneration.types
    close = LiveGeneration.close

    def _init_vllm(self) -> None:
        teacher, theta = str(self.plan.generator.teacher), self.model.name_or_path
        self.backend = TransformersBackend(teacher, theta, dtype=torch.float32)

    def left_out(self) -> tuple[str, ...]:
        return ()

    def _push(self) -> None:
        self.backend.load_theta((name, weight.clone()) for name, weight in self._iter_named_params())


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_trainer, "build_generation", lambda plan, _, **given: CopyGeneration(plan, **given))


def make(pair: tuple[str, str], folder: Path, **settings: Any) -> Any:
    trainer = settings.pop("trainer", {}) | {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:8]})}
    return make_trainer("grpo", pair, folder, trainer=trainer, **QUICK | {"max_steps": 2} | settings)


def batch(trainer: Any) -> int:
    """Sample a batch as in an evaluation; how often that pushed."""
    trainer.model.eval()
    before = trainer.vllm_generation.pushes
    trainer._generate_and_score_completions([{"prompt": text} for text in TEXTS[:4]])
    return trainer.vllm_generation.pushes - before


@torch.no_grad()
def edit_in_place(trainer: Any) -> None:
    next(trainer.model.parameters()).mul_(1.5)


def edit_past_autograd(trainer: Any) -> None:
    next(trainer.model.parameters()).data.neg_()


def exchange_two_rows(trainer: Any) -> None:
    weight = trainer.model.lm_head.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def put_another_tensor(trainer: Any) -> None:
    weight = next(trainer.model.parameters())
    weight.data = weight.data * 1.5


def load_a_state(trainer: Any) -> None:
    state = {name: value * 1.01 for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)


@pytest.mark.parametrize(
    "change", [edit_in_place, edit_past_autograd, exchange_two_rows, put_another_tensor, load_a_state]
)
def test_every_change_is_pushed_once(pair: tuple[str, str], tmp_path: Path, change: Any) -> None:
    trainer = make(pair, tmp_path)
    assert [batch(trainer), batch(trainer)] == [1, 0]
    change(trainer)
    assert [batch(trainer), batch(trainer)] == [1, 0]


def test_an_adapter_that_is_scaled_or_exchanged_is_pushed(pair: tuple[str, str], tmp_path: Path) -> None:
    """No parameter changes then."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"], init_lora_weights=False)
    trainer = make(pair, tmp_path, trainer={"peft_config": config})
    layer = next(module for module in trainer.model.modules() if hasattr(module, "set_scale"))
    assert [batch(trainer), batch(trainer)] == [1, 0]
    layer.set_scale("default", 3.0)
    assert [batch(trainer), batch(trainer)] == [1, 0]
    trainer.model.add_adapter("other", config)
    trainer.model.set_adapter("other")
    assert [batch(trainer), batch(trainer)] == [1, 0]
    with trainer.model.disable_adapter():
        assert [batch(trainer), batch(trainer)] == [1, 0]
    assert batch(trainer) == 1


def test_training_and_evaluation(pair: tuple[str, str], tmp_path: Path) -> None:
    """Each state of the student is pushed once, also where an evaluation has two batches; and so is the best one."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(
        pair,
        tmp_path,
        **best,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_step",
        greater_is_better=False,
    )
    plain = trainer.evaluate

    def evaluate(*positional: Any, **keywords: Any) -> dict[str, float]:
        logs = plain(*positional, **keywords)
        logs["eval_step"] = float(trainer.state.global_step)
        return logs

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    pushed = trainer.vllm_generation.pushes
    assert pushed == 3  # as the folder has it, after the first step, after the second
    trainer.evaluate()
    assert trainer.vllm_generation.pushes == pushed + 1
    student = dict(trainer.vllm_generation.backend.theta.named_parameters())
    assert all(torch.equal(parameter, student[name]) for name, parameter in trainer.model.named_parameters())


def test_a_callback_that_edits_between_two_batches_of_a_step(pair: tuple[str, str], tmp_path: Path) -> None:
    class Edit(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            next(model.parameters()).data.mul_(1.1)

    trainer = make(
        pair,
        tmp_path,
        trainer={"callbacks": [Edit()]},
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        max_steps=1,
    )
    trainer.train()  # the guard would stop it
    assert trainer.vllm_generation.pushes == 2
