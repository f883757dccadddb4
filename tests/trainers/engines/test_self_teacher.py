"""The student as its own teacher: which weights each of the two has at each step, and how often they are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers.models import make_model
from helpers.oracle import check_rollout
from helpers.training import PROMPTS, Watch, load, make_trainer, make_untrained_pair
from optimal_sampling_trl import OptimalSamplingGenerator

ROWS = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": [f"{text[::-1]}{text}" for text in PROMPTS]})
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))[1]


def own(student: str, folder: Path, kind: str = "grpo", trainer: dict[str, Any] | None = None, **given: Any) -> Any:
    """A trainer whose teacher is the student, on rows with prompts of the teacher's own."""
    generator = {"teacher": "student"} | given
    further = {"train_dataset": ROWS} | (trainer or {})
    return make_trainer(kind, (student, student), folder, mixin=Watch, generator=generator, trainer=further)


def model_of(student: str, weights: dict[str, Tensor], adapter: bool) -> Any:
    """A plain model with the student's weights of a moment, with or without its adapter."""
    if not any("lora" in name for name in weights):
        model = load(student)
        model.load_state_dict(weights, strict=False)
        return model
    model = get_peft_model(load(student), LORA)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return (model.merge_and_unload() if adapter else model.unload()).eval()


def check(trainer: Any, student: str, *, teacher_at: int | None, adapter: bool = True) -> None:
    """Hold each batch against the oracle: the teacher is the student of batch `teacher_at`, or of its own batch."""
    assert len(trainer.generations) == 3
    for step, (_, _, rollouts) in enumerate(trainer.generations):
        theta = model_of(student, trainer.weights[step], adapter=True)
        teacher = model_of(student, trainer.weights[step if teacher_at is None else teacher_at], adapter=adapter)
        for rollout in rollouts:
            assert rollout.prompt_ids != rollout.theta_prompt_ids
            check_rollout(rollout, teacher, theta, tolerance=1e-4)
    if teacher_at is not None or not adapter:  # the check means something: the student of the moment is another
        mixed = next(rollout for rollout in rollouts if not rollout.mixture.is_theta_only)
        with pytest.raises(AssertionError, match="off by"):
            check_rollout(mixed, theta, theta, tolerance=1e-4)


def storages(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("kind", ["grpo", "raft", "sampled_token"])
def test_as_new_as_the_student(student: str, tmp_path: Path, kind: str) -> None:
    trainer = own(student, tmp_path, kind)
    backend = trainer.vllm_generation.backend
    assert backend.teacher is backend.theta is trainer.model
    trainer.train()
    check(trainer, student, teacher_at=None)
    assert trainer.model.training is False or all(p.requires_grad for p in trainer.model.parameters())


def test_as_it_was_before_training(student: str, tmp_path: Path) -> None:
    trainer = own(student, tmp_path, "rloo", teacher_refresh="never")
    backend = trainer.vllm_generation.backend
    assert not storages(backend.teacher) & storages(backend.theta)
    trainer.train()
    check(trainer, student, teacher_at=0)


def test_it_needs_no_other_prompt_to_differ(student: str, tmp_path: Path) -> None:
    rows = {"train_dataset": ROWS.remove_columns("teacher_prompt")}
    trainer = own(student, tmp_path, "grpo", rows, teacher_refresh="never")
    trainer.train()
    log = [entry["mixture/kl_theta"] for entry in trainer.state.log_history if "mixture/kl_theta" in entry]
    assert log[0] == pytest.approx(0.0, abs=1e-6)
    assert log[-1] > 1e-4


@pytest.mark.parametrize("adapter", [True, False], ids=["on", "off"])
def test_with_an_adapter(student: str, tmp_path: Path, adapter: bool) -> None:
    """Weights once in memory; the adapter is trained whether the teacher has it on or off."""
    trainer = own(student, tmp_path, "grpo", {"peft_config": LORA}, teacher_adapter=adapter)
    backend = trainer.vllm_generation.backend
    assert storages(backend.teacher) == storages(backend.theta)
    trainer.train()
    assert all(p.requires_grad == ("lora" in name) for name, p in trainer.model.named_parameters())
    check(trainer, student, teacher_at=None, adapter=adapter)


def test_an_adapter_as_it_was_before_training(student: str, tmp_path: Path) -> None:
    """The layers below the adapter are shared: what is copied is what is trained."""
    trainer = own(student, tmp_path, "grpo", {"peft_config": LORA}, teacher_refresh="never")
    backend = trainer.vllm_generation.backend
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert len(storages(backend.teacher) & storages(backend.theta)) == len(frozen) > 0
    trainer.train()
    check(trainer, student, teacher_at=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": "large", "teacher_refresh": "never"}, "`teacher_refresh` is 'never', which is read of `teacher="),
        ({"teacher": "large", "teacher_adapter": False}, "`teacher_adapter` is False, which is read of `teacher="),
        ({"teacher_refresh": "epoch"}, "Unknown value of `teacher_refresh`.*'epoch'|`teacher_refresh`.*'epoch'"),
        ({"teacher_refresh": "never", "teacher_adapter": False}, "the model below the adapter never changes"),
        ({"teacher_adapter": 1}, "`teacher_adapter`"),
        ({"backend": "vllm"}, "`backend` is 'vllm' and `teacher` 'student': vLLM's engine holds two models"),
        ({"engine_arguments": {"revision": "main"}}, "`engine_arguments` has `revision`, which says how a teacher"),
    ],
)
def test_settings_that_contradict(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimalSamplingGenerator(**{"teacher": "student"} | given)


def test_a_folder_of_that_name_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "student", "llama", 0)
    with pytest.raises(ValueError, match=r"there is a folder of that name\. Write '\./student'"):
        OptimalSamplingGenerator("student")
    assert not OptimalSamplingGenerator("./student").is_own_teacher


def test_trainers_that_cannot_have_it(student: str, tmp_path: Path) -> None:
    rows = {"train_dataset": ROWS.remove_columns("teacher_prompt")}
    with pytest.raises(ValueError, match="both read the same prompt: their mixture is the student itself"):
        own(student, tmp_path, "grpo", rows)
    with pytest.raises(ValueError, match="TRL's divergence"):
        own(student, tmp_path, "divergence")
    with pytest.raises(ValueError, match="`teacher_adapter` is False, and the student has no adapter to leave out"):
        own(student, tmp_path, "grpo", teacher_adapter=False)
    with pytest.raises(ValueError, match="`vllm_mode` is 'server' and `teacher` 'student'"):
        make_trainer(
            "grpo", (student, student), tmp_path, generator={"teacher": "student", "backend": "auto"},
            trainer={"train_dataset": ROWS}, vllm_mode="server",
        )  # fmt: skip
