"""Every trainer: metrics, two prompts, adapters, and what is refused before anything is loaded."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from transformers import AutoTokenizer

from helpers.models import make_model
from helpers.oracle import check_dense, check_rollout
from helpers.training import (
    KINDS,
    TEXTS,
    Watch,
    check_batch,
    digits,
    load,
    make_trainer,
    one_batch,
    rows_of,
)
from optimal_sampling_trl import Dense, Mixture, OptimalSamplingV1
from optimal_sampling_trl.rollouts.rollout import RECORDS
from optimal_sampling_trl.trainers.engines import seam
from optimal_sampling_trl.trainers.mixture_trainer import MixtureTrainer

RL = ("grpo", "rloo")
THEIRS = (trl.GRPOTrainer, trl.RLOOTrainer, trl.DistillationTrainer)
SERVED: dict[str, Any] = {"generator": {"backend": "auto"}, "vllm_mode": "server"}


def test_the_docstring_lists_what_is_overridden() -> None:
    overridden = {
        name
        for base in MixtureTrainer.__mro__[:-1]
        for name, value in vars(base).items()
        if inspect.isfunction(value) and any(hasattr(trainer, name) for trainer in THEIRS)
    }
    lines = [line for line in inspect.cleandoc(str(MixtureTrainer.__doc__)).splitlines() if line.startswith("- ")]
    assert {name for line in lines for name in re.findall(r"`(\w+)`", line.split(":")[0])} == overridden


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_by_recomputation(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "alpha/mean" in entry]
    assert len(logs) == len(trainer.generations) == 3
    for log, (_, output, rollouts) in zip(logs, trainer.generations, strict=True):
        mixed = [r for r, chosen in zip(rollouts, output["mixture_rows"].tolist(), strict=True) if chosen]
        assert len(mixed) == (4 if kind in RL else 8)
        alpha, log_q, log_theta, log_teacher = (
            np.concatenate([getattr(r, name).double().numpy() for r in mixed]) for name in RECORDS
        )
        weights = np.exp(log_theta - log_q)
        wanted = {
            "alpha/mean": alpha.mean(),
            "alpha/q10": np.quantile(alpha, 0.1),
            "alpha/q50": np.quantile(alpha, 0.5),
            "alpha/q90": np.quantile(alpha, 0.9),
            "mixture/kl_theta": (log_q - log_theta).mean(),
            "mixture/kl_teacher": (log_q - log_teacher).mean(),
            "mixture/ess": weights.sum() ** 2 / (weights**2).sum() / len(weights),
            "mixture/acceptance": np.minimum(weights, 1).mean(),
        }
        if kind in RL:
            scores = np.array([digits(rollout.text) for rollout in rollouts]).reshape(-1, 4)
            wanted |= {
                "mixture/reward_theta": scores[:, :2].mean(),
                "mixture/reward_mixture": scores[:, 2:].mean(),
                "mixture/groups_with_signal": (scores.max(1) > scores.min(1)).mean(),
                "reward": scores.mean(),
            }
        assert {name: log[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert log["mixture/tokens_per_second"] > 0
        if kind == "grpo":
            assert 0 <= log["engine/log_theta_difference"] < 1e-5
            assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "divergence"])
def test_exact_numbers_are_logged_where_the_rollouts_carry_them(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    """The generator asks for dense records: each batch has them, and the metrics are their means, no estimates."""
    wish = Dense(("kl_q_theta", "kl_q_teacher", "overlap"), 2)
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, generator={"dense": wish}, max_steps=1)
    trainer.train()
    ((_, output, rollouts),) = trainer.generations
    teacher, theta = load(pair[0]), load(pair[1])
    for rollout in rollouts:
        check_dense(rollout, wish, teacher, theta)
    mixed = [r for r, chosen in zip(rollouts, output["mixture_rows"].tolist(), strict=True) if chosen]
    log = next(entry for entry in trainer.state.log_history if "alpha/mean" in entry)
    names = {"mixture/kl_theta": "kl_q_theta", "mixture/kl_teacher": "kl_q_teacher", "mixture/acceptance": "overlap"}
    for metric, name in names.items():
        wanted = torch.cat([rollout.dense.scalars[name] for rollout in mixed]).mean()
        assert log[metric] == pytest.approx(float(wanted), rel=1e-4), metric


@pytest.mark.parametrize("kind", RL)
def test_a_batch_without_a_token_to_train_on_has_finite_metrics(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    settings = {"mask_truncated_completions": True, "max_completion_length": 1}
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, **settings)
    batch = one_batch(trainer, [text for text in TEXTS[:2] for _ in range(4)])
    assert not batch["completion_mask"].any()
    for name, values in trainer._metrics["train"].items():
        assert bool(np.isfinite(values).all()), name


def test_the_engines_difference_is_measured_against_the_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    """A log θ that is 0.01 off in the engine's record shows as 0.01."""
    trainer = make_trainer("grpo", pair, tmp_path, log_theta_tolerance=torch.inf)  # the guard only warns
    take = trainer.vllm_generation.pop_turns

    def off() -> Any:
        turns = take()
        for (rollout,) in turns:
            rollout.log_theta.add_(0.01)
        return turns

    trainer.vllm_generation.pop_turns = off
    one_batch(trainer, TEXTS[:1] * 4)
    assert trainer._metrics["train"]["engine/log_theta_difference"] == pytest.approx([0.01], abs=1e-5)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "divergence"])
def test_two_system_prompts(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str, chat: bool) -> None:
    """The records are those of a teacher that read its own system prompt; the student trains on its own."""
    from datasets import Dataset

    texts = TEXTS[:8]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    generator = {"teacher_system_prompt": "sort the digits", "theta_system_prompt": "go"}
    trainer = make_trainer(
        kind,
        pair,
        tmp_path,
        generator=generator,
        mixin=Watch,
        max_steps=1,
        trainer={"train_dataset": Dataset.from_dict({"prompt": prompts * 2})},
    )
    trainer.train()
    tokenizer, theta = AutoTokenizer.from_pretrained(pair[0]), load(pair[1])
    between = "\n" if chat else "\n\n"
    known = {tuple(tokenizer(f"go{between}{text}").input_ids): text for text in texts}
    (_, _, rollouts) = trainer.generations[0]
    for rollout in rollouts:
        text = known[tuple(rollout.theta_prompt_ids)]
        assert rollout.prompt_ids == tokenizer(f"sort the digits{between}{text}").input_ids
        check_rollout(rollout, teacher, theta, tolerance=2e-5)
    by_ids = defaultdict(list)
    for rollout in rollouts:
        by_ids[tuple(rollout.theta_prompt_ids), tuple(rollout.completion_ids)].append(rollout)
    for inputs in trainer.micro_batches:
        for prompt, completion, records in rows_of(inputs):
            same = by_ids[tuple(prompt), tuple(completion)]
            assert any(torch.equal(records["log_teacher"], rollout.log_teacher) for rollout in same)


@pytest.mark.parametrize("kind", KINDS)
def test_lora(pair: tuple[str, str], teacher: Any, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(kind, pair, tmp_path, mixin=Watch, trainer={"peft_config": config})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    # The last generation was sampled by the adapted student, not by the base.
    theta = peft.get_peft_model(load(pair[1]), config).eval()
    theta.load_state_dict(trainer.weights[-1], strict=False)
    check_batch(trainer.generations[-1][1], teacher, theta, Mixture(), tolerance=2e-5)
    with pytest.raises(AssertionError, match="off by"):
        check_batch(trainer.generations[-1][1], teacher, load(pair[1]), Mixture(), tolerance=2e-5)


def test_a_saved_adapter_is_refused_with_the_line_that_merges_it(pair: tuple[str, str], tmp_path: Path) -> None:
    """The line gives a student whose log θ is that of the module that was trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer("raft", pair, tmp_path, trainer={"peft_config": config}, max_steps=1)
    trainer.train()
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    trainer.save_model(adapter)
    teacher, student = pair
    words = {}
    for role, attempt in {
        "teacher": lambda: OptimalSamplingV1(adapter, student, backend="transformers"),
        "student": lambda: OptimalSamplingV1(teacher, adapter, backend="transformers"),
        "student ": lambda: make_trainer("raft", (teacher, adapter), tmp_path),
        "teacher ": lambda: make_trainer("raft", (adapter, student), tmp_path),
    }.items():
        start = f"^The {role.strip()} could not be loaded from '{adapter}': it holds an adapter "
        with pytest.raises(ValueError, match=start) as error:
            attempt()
        words[role] = str(error.value)
    (line,) = {re.findall("`(Auto.*)`", each)[0] for each in words.values()}
    exec(line.replace("'merged'", repr(merged)), vars(peft))
    with pytest.raises(ValueError, match="student's tokenizer could not be loaded"):
        OptimalSamplingV1(teacher, merged, backend="transformers")
    trainer.processing_class.save_pretrained(merged)
    with OptimalSamplingV1(teacher, merged, backend="transformers") as sampler:
        rollouts = sampler.generate(TEXTS[:4], max_tokens=6).rollouts
    for rollout in rollouts:
        check_rollout(rollout, load(teacher), trainer.model.eval(), tolerance=2e-5)
    with pytest.raises(AssertionError):
        check_rollout(rollouts[0], load(teacher), load(student), tolerance=2e-5)


def test_lora_in_a_hybrid_inside_of_a_wrapper(tmp_path: Path) -> None:
    """The trainer reads padded batches at once and the rollouts a token at a time: the states have to be the same."""
    peft = pytest.importorskip("peft")
    folders = make_model(tmp_path / "teacher", "qwen3_5_text", 0), make_model(tmp_path / "student", "qwen3_5", 1)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["in_proj_qkv", "in_proj_a", "out_proj", "q_proj"])
    further = {"peft_config": config, "processing_class": AutoTokenizer.from_pretrained(folders[1])}
    trainer = make_trainer("grpo", folders, tmp_path, trainer=further, learning_rate=3e-2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name and "visual" not in name}
    logs = [log["engine/log_theta_difference"] for log in trainer.state.log_history if "alpha/mean" in log]
    assert len(logs) == 3
    assert max(logs) < 2e-5


def refused(message: str, kind: str, pair: tuple[str, str], tmp_path: Path, **build: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, pair, tmp_path, **build)


def test_a_server_takes_vllm_here_too(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "find_spec", lambda name: None)
    refused("`vllm_mode` is 'server', but vLLM is not installed", "grpo", pair, tmp_path, **SERVED)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence"])
def test_refusals_of_every_trainer(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    def refuse(message: str, **build: Any) -> None:
        refused(message, kind, pair, tmp_path, **build)

    refuse(
        r"`generator` is 'large'; wanted an `OptimalSamplingGenerator\(.*TRL's own trainer",
        trainer={"generator": "large"},
    )
    refuse(r"`generator` is None; wanted an `OptimalSamplingGenerator", trainer={"generator": None})
    refuse("`vllm_mode` is 'server' and `backend` 'transformers'; wanted 'vllm' or 'auto'", vllm_mode="server")
    refuse(r"`temperature` is 0; .*no probability to train with\. Raise it", temperature=0.0)
    refuse(r"`vllm_structured_outputs_regex` is not supported .*Drop it", vllm_structured_outputs_regex="[0-9]+")
    refuse(r"`generation_kwargs` has a `seed`, .*equal\. Set the trainer's `seed`", generation_kwargs={"seed": 1})
    refuse(
        r"Unknown entry of `generation_kwargs` 'top_kk'\. Known: .*Did you mean 'top_k'\?",
        generation_kwargs={"top_kk": 1},
    )
    refuse(r"Unknown correction 'prefix_trunc'\. .*Did you mean 'prefix_truncate'\?", correction="prefix_trunc")
    refuse(r"`vllm_tensor_parallel_size` is 2; .*Set it to 1 or use `backend=\"vllm\"`", vllm_tensor_parallel_size=2)
    refuse(
        r"`theta_fraction` is 0\.01 of a group of \d+, which rounds to 0; wanted .*Raise the group",
        generator={"theta_fraction": 0.01},
    )
    refuse(
        r"`theta_fraction` is 0\.99 of a group of \d+, which rounds to \d+; wanted", generator={"theta_fraction": 0.99}
    )


def test_refusals_of_one_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in ("token_truncate", "prefix_luffy"):
        refused(
            rf"`correction` is '{name}'; RLOO weighs whole completions, so wanted 'none' or .*'sequence_truncate'",
            "rloo",
            pair,
            tmp_path,
            correction=name,
        )
    for name in ("token_truncate", "sequence_mask"):
        refused(
            rf"`correction` is '{name}'; the divergence at a position is exact .*'prefix_truncate'",
            "divergence",
            pair,
            tmp_path,
            correction=name,
        )
    refused(
        r"`loss` is 'sampled_token', .*`teacher_model` was given as well\. Drop it, or set `loss='divergence'`",
        "sampled_token",
        pair,
        tmp_path,
        trainer={"teacher_model": pair[0]},
    )
    other = str(tmp_path / "other")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "grpo",
            {"loss_type": "vespo", "correction": "sequence_mask"},
            r"'sequence_mask' and `loss_type` 'vespo', .*wanted one of none, token_truncate, token_mask",
        ),
        (
            "grpo",
            {"correction": "token_mask", "correction_window": 3},
            r"`correction_window` is 3, and `correction='token_mask'` does not read it; wanted it with 'prefix'",
        ),
        ("rloo", {"correction_self_normalise": True}, r"is True, and `correction='none'` does not read it"),
        ("grpo", {"use_transformers_continuous_batching": True}, r"is for TRL's own rollouts\. Drop it"),
        ("grpo", {"generator": {"engine_arguments": {"device": "cpu"}}}, r"has `device`, which is the trainer's"),
        ("sampled_token", {"beta": 0.5}, r"`beta` is 0\.5, and `loss='sampled_token'` does not read it"),
        ("sampled_token", {"teacher_model_revision": "v2"}, r"`teacher_model_revision` is 'v2', and"),
        ("divergence", {"sampled_token_clip": 1.0}, r"is 1\.0, and `loss='divergence'` does not read it"),
        ("divergence", {"teacher_model_revision": "v2"}, r"is 'v2' and the `revision` among .* None; wanted one"),
        (
            "divergence",
            {"trainer": {"teacher_model": other}},
            rf"`teacher_model` is '{other}' and the generator's `teacher` .*Drop `teacher_model`",
        ),
    ]
    for kind, settings, words in cases:
        refused(words, kind, pair, tmp_path, **settings)
    refused(
        r"Unknown loss of distillation 'sample_token'\. Known: .*Did you mean 'sampled_token'\?",
        "divergence",
        pair,
        tmp_path,
        loss="sample_token",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_would_not_be_trained_is_refused(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """One on the output layer, which the losses pass by; and one that puts tokens before the prompt."""
    peft = pytest.importorskip("peft")
    for settings in ({"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": {"lm_head": [3]}}):
        fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | settings
        words = r"(?s)adapter \(LORA\) is on its output layer|PEFT adapter to `lm_head` is not supported"
        refused(words, kind, pair, tmp_path, trainer={"peft_config": peft.LoraConfig(**fields)})
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    words = "kind PROMPT_TUNING, which is no change of its weights|Prompt-learning PEFT methods .* are not supported"
    refused(words, kind, pair, tmp_path, trainer={"peft_config": soft})


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_as_student_and_teacher_is_refused(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Also where an adapter is put into it, or it is another module on the same weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = load(pair[1])
    for student in ({"model": model}, {"model": model, "peft_config": config}):
        words = "The teacher and the student share the weight"
        refused(words, kind, pair, tmp_path, generator={"teacher": model}, trainer=student)
