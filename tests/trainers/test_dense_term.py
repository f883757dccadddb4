"""Dense losses: their gradient against the divergence of the whole vocabulary, and what they ask and log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import pair as embedded
from helpers.oracle import pair_logits
from helpers.training import TEXTS, Watch, load, make_trainer, make_untrained_pair, one_batch
from optimal_sampling_trl.divergences import DIVERGENCES, divergence
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense

V = len(embedded.VOCABULARY)
ALL = {"dense_top_k": V}
RL = ("grpo", "rloo", "raft")
PROMPTS = [text for text in TEXTS[:3] for _ in range(4)]
ONE_STEP = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": len(PROMPTS)}
HALF: dict[str, Any] = {"theta_fraction": 0.5}


def exact(trainer: Any, batch: dict[str, Tensor], beta: float, names: tuple[str, str]) -> tuple[Any, Tensor]:
    """A float64 student, and the divergence (N,) over the whole common vocabulary at each token of a batch."""
    teacher, theta = (load(name).double() for name in names)
    rows = []
    for rollout, mask in zip(trainer.rollouts, batch["completion_mask"].bool(), strict=True):
        logits = theta(input_ids=torch.tensor([[*rollout.theta_prompt_ids, *rollout.completion_ids]]), use_cache=False)
        begin = len(rollout.theta_prompt_ids) - 1
        with torch.no_grad():
            of_teacher = pair_logits(rollout, teacher, theta, trainer.vllm_generation.pair.ending)[1]
        T = trainer.args.temperature
        common = of_teacher.shape[1]
        log_theta = (logits.logits[0, begin:-1] / T).log_softmax(-1)[:, :common]
        log_teacher = (of_teacher / T).log_softmax(-1)
        assert int(mask.sum()) == len(log_theta)
        both = log_teacher.isfinite()
        rows.append(
            torch.stack([divergence(s[keep], t[keep], beta) for s, t, keep in zip(log_theta, log_teacher, both)])
        )
    return theta, torch.cat(rows)


def assert_gradient(model: Any, wanted: Any, factor: float = 1.0) -> None:
    """The gradient that a model holds is `factor` times that of the float64 student."""
    exact = dict(wanted.named_parameters())
    largest = factor * max(float(parameter.grad.abs().max()) for parameter in exact.values())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        assert float((parameter.grad.double() - factor * exact[name].grad).abs().max()) < 2e-4 * largest, name


def loss_of(trainer: Any, batch: dict[str, Tensor]) -> float:
    """The loss of a batch, whose gradient is left in the model."""
    trainer.current_gradient_accumulation_steps = 1  # which `train()` would set
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item()


def term_of(trainer: Any, batch: dict[str, Tensor]) -> float:
    """The loss with the dense term less the loss without it; the difference of the gradients is left in the model."""
    with_term = loss_of(trainer, batch)
    gradients = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.args.dense_coefficient = 0.0
    without = loss_of(trainer, batch)
    for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        parameter.grad = gradient - parameter.grad
    return with_term - without


# The term.


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {"dense_divergence": "forward", "temperature": 0.7}),
        ("grpo", {"loss_type": "grpo"}),
        ("rloo", {"temperature": 1.3}),
        ("raft", {"dense_divergence": "js", "accept": 2.0}),
        ("raft", {"num_generations": 4, "denominator": "accepted"}),
    ],
    ids=str,
)
def test_the_term_adds_the_divergence_of_the_vocabulary(
    pair: tuple[str, str], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    """At k = V, on the student's own rows and the mixture's: the loss with the term less the loss without it."""
    trainer = make_trainer(kind, pair, tmp_path, generator=HALF, dense_coefficient=0.3, **ALL, **ONE_STEP | settings)
    batch = one_batch(trainer, PROMPTS)
    assert len(set(batch["mixture_rows"].tolist())) == 2
    term = term_of(trainer, batch)
    theta, wanted = exact(trainer, batch, DIVERGENCES[trainer.args.dense_divergence], pair)
    wanted.mean().backward()
    assert term == pytest.approx(0.3 * wanted.mean().item(), rel=1e-4)
    assert_gradient(trainer.model, theta, 0.3)
    logged = trainer._metrics["train"]
    assert logged["dense/divergence"] == pytest.approx([wanted.mean().item()], rel=1e-4)
    assert logged["dense/coefficient"] == [0.3]


def parity(completions: list[str], **columns: Any) -> list[float]:
    """A reward that half of all completions do not earn."""
    return [float(len(text) % 2) for text in completions]


@pytest.mark.parametrize("positive_only", ["all", "none"])
def test_routed_credit_takes_wrong_completions_to_the_teacher(
    pair: tuple[str, str], tmp_path: Path, positive_only: str
) -> None:
    """The term is over wrong completions alone, weighted by exp(−H(t)), and their advantage is 0."""
    given = {"generator": HALF, "trainer": {"reward_funcs": parity}, "positive_only": positive_only, **ONE_STEP}
    plain = one_batch(make_trainer("grpo", pair, tmp_path, **given), PROMPTS)
    trainer = make_trainer("grpo", pair, tmp_path, credit="routed", dense_coefficient=0.3, **ALL, **given)
    batch, wrong = one_batch(trainer, PROMPTS), trainer.rewards == 0
    assert 2 < int(wrong.sum()) < 10
    assert torch.equal(batch["advantages"], plain["advantages"].masked_fill(wrong, 0.0))
    assert bool((plain["advantages"][wrong] != 0).any()) == (positive_only == "none")
    term = term_of(trainer, batch)
    theta, divergences = exact(trainer, batch, 1.0, pair)
    mask = batch["completion_mask"].bool()
    weights = torch.exp(-batch["dense_entropy_teacher"].double()[mask]) * wrong[:, None].expand_as(mask)[mask]
    wanted = (weights / weights[weights > 0].mean() * divergences).mean()
    wanted.backward()
    assert term == pytest.approx(0.3 * wanted.item(), rel=1e-4)
    assert_gradient(trainer.model, theta, 0.3)


@pytest.mark.parametrize("kind", RL)
def test_few_tokens_say_less_than_all(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    values = []
    for k in (1, 4, 16, V):
        trainer = make_trainer(kind, pair, tmp_path, dense_coefficient=1.0, dense_top_k=k, **ONE_STEP)
        batch = one_batch(trainer, PROMPTS)
        assert batch["dense_ids"].shape[-1] == 2 * k
        loss_of(trainer, batch)
        values += trainer._metrics["train"]["dense/divergence"]
    assert values == sorted(values)
    assert 0 < values[0] < 0.9 * values[-1]
    assert values[2] > 0.9 * values[-1]


@pytest.mark.parametrize("k", [1, 4, V], ids="k={}".format)
@pytest.mark.parametrize("kind", [*RL, "routed", "dense"])
def test_what_a_user_records_leaves_the_loss_as_it_is(
    pair: tuple[str, str], tmp_path: Path, kind: str, k: int
) -> None:
    """Loss, divergence and gradient of the same rollouts, recorded for the loss alone and with all that there is."""
    settings: dict[str, Any] = {"dense_top_k": k} | ({} if kind == "dense" else {"dense_coefficient": 1.0})
    settings |= {"credit": "routed", "trainer": {"reward_funcs": parity}} if kind == "routed" else {}
    kind = "grpo" if kind == "routed" else kind
    losses, gradients, sampled = [], [], []
    for wish in (None, Dense(SCALARS, 2), Dense(("kl_q_theta",), 16), Dense((), V)):
        generator = HALF | {"dense": wish}
        trainer = make_trainer(kind, pair, tmp_path, generator=generator, **ONE_STEP | settings)
        batch = one_batch(trainer, PROMPTS)
        assert trainer.rollouts[0].dense.ids.shape[1] == 2 * max(k, wish.top_k if wish else 0)
        sampled.append([rollout.completion_ids for rollout in trainer.rollouts])
        loss = loss_of(trainer, batch)
        losses.append([loss, *trainer._metrics["train"]["dense/divergence"]])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]))
    assert sampled == [sampled[0]] * 4
    assert losses == [pytest.approx(losses[0], rel=1e-6)] * 4
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).abs().max()) < 1e-5 * float(gradients[0].abs().max())


@pytest.mark.parametrize("kind", RL)
def test_micro_batches_add_up_to_the_batch(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Of different length: the term is a mean over the tokens of both, in RLOO as well, whose micro-batches
    transformers averages."""
    trainer = make_trainer(kind, pair, tmp_path, generator=HALF, dense_coefficient=1.0, **ALL)
    trainer.current_gradient_accumulation_steps = 2
    batch = one_batch(trainer, TEXTS[:2] * 4 if kind == "raft" else [text for text in TEXTS[:2] for _ in range(4)])
    halves = [{name: x[part] if x.ndim else x for name, x in batch.items()} for part in (slice(3), slice(3, None))]
    counts = [int(half["completion_mask"].sum()) for half in halves]
    assert counts[0] != counts[1]
    terms = []
    for half in halves:
        trainer.args.dense_coefficient = 1.0
        with_term = trainer.compute_loss(trainer.model, half)
        trainer.args.dense_coefficient = 0.0
        terms.append((with_term - trainer.compute_loss(trainer.model, half)).item())
    assert sum(terms) / (2 if kind == "rloo" else 1) == pytest.approx(
        exact(trainer, batch, 1.0, pair)[1].mean().item()
    )
    logged = trainer._metrics["train"]["dense/divergence"]
    assert logged == pytest.approx([exact(trainer, batch, 1.0, pair)[1].mean().item()])


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_micro_batches_weigh_by_their_tokens_in_the_log(
    pair: tuple[str, str], tmp_path: Path, logging_steps: int
) -> None:
    """Truncated completions count nowhere, so that some micro-batches have few tokens, or none; an evaluation in
    between counts for itself."""
    data = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:3]})}
    generator = HALF | {"dense": Dense(("entropy_theta",), V)}
    trainer = make_trainer(
        "raft", pair, tmp_path, mixin=Watch, trainer=data, generator=generator, dense_coefficient=1.0, **ALL,
        mask_truncated_completions=True, max_completion_length=24, gradient_accumulation_steps=4,
        per_device_train_batch_size=2, learning_rate=0.0, logging_steps=logging_steps,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    counts = [int(batch["completion_mask"].sum()) for batch in trainer.micro_batches]
    assert min(counts) == 0
    assert len({*counts}) > 3
    batches = [output for training, output, _ in trainer.generations if training]
    logs, evaluated = list(trainer.state.log_history), trainer.evaluate()
    for name, column in {"dense/divergence": "dense_kl_theta_teacher", "entropy": "dense_entropy_theta"}.items():
        of_steps = [batch[column][batch["completion_mask"].bool()] for batch in batches]
        parts = [torch.cat(of_steps)] if logging_steps == 3 else of_steps
        logged = [log[name] for log in logs if name in log]
        assert logged == pytest.approx([part.mean().item() for part in parts if len(part)], rel=1e-4)
        assert f"eval_{name}" in evaluated


def test_the_term_fades_and_then_asks_for_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    """Four steps, gone after three: the last batch carries no dense records, nor does the evaluation after it."""
    data = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    settings = {"dense_coefficient": 0.6, "dense_fade": 0.75, "max_steps": 4, "per_device_eval_batch_size": 16}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Watch, trainer=data, **settings)
    assert "eval_dense/divergence" in trainer.evaluate()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log.get("dense/coefficient", 0.0) for log in logs] == pytest.approx([0.6, 0.4, 0.2, 0.0])
    assert ["dense/kl_theta_teacher" in log for log in logs] == [True, True, True, False]
    assert "eval_dense/divergence" not in trainer.evaluate()
    dense = [rollouts[0].dense is not None for _, _, rollouts in trainer.generations]
    assert dense == [True, True, True, True, False, False]


def test_the_exact_distance_is_logged(pair: tuple[str, str], tmp_path: Path) -> None:
    """KL(θ‖t) of the vocabulary in the engine is that of the trainer; of the term it is a part of it."""
    trainer = make_trainer("grpo", pair, tmp_path, dense_coefficient=1.0, dense_top_k=2, generator=HALF, **ONE_STEP)
    batch = one_batch(trainer, PROMPTS)
    loss_of(trainer, batch)
    logged = trainer._metrics["train"]
    _, wanted = exact(trainer, batch, 1.0, pair)
    assert logged["dense/kl_theta_teacher"] == pytest.approx([wanted.mean().item()], rel=1e-4)
    assert logged["dense/divergence"][0] < logged["dense/kl_theta_teacher"][0]


def test_an_adapter_trains_by_the_term_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    """RAFT that accepts nothing, with LoRA: what moves the student is the term, and it comes nearer to the teacher."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"trainer": {"peft_config": adapter}, "accept": 2.0, "dense_coefficient": 1.0}
    trainer = make_trainer("raft", pair, tmp_path, max_steps=12, per_device_train_batch_size=16, **given)
    trainer.train()
    distances = [log["dense/divergence"] for log in trainer.state.log_history if "loss" in log]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx(distances, rel=0.05)  # micro-batches of different length
    assert distances[-1] < 0.9 * distances[0]


# Distillation.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0, "temperature": 1.3},
        {"beta": 0.3, "correction": "prefix_truncate", "correction_clip_max": 1.5},
    ],
    ids=str,
)
def test_the_dense_loss_is_trls_at_every_token(
    pair: tuple[str, str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Loss and gradient of the same batch, with half of its rows from the student; and there is no teacher."""
    losses, gradients = [], []
    for kind, own in (("divergence", {}), ("dense", ALL)):
        trainer = make_trainer(kind, pair, tmp_path, generator=HALF, **ONE_STEP | settings | own)
        batch = one_batch(trainer, PROMPTS)
        losses.append(loss_of(trainer, batch))
        gradients.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    assert getattr(trainer, "teacher_model", None) is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for trls, ours in zip(*gradients, strict=True):
        assert float((trls - ours).abs().max()) < 2e-4 * largest


@pytest.mark.parametrize("case", ["two prompts", "padded vocabulary", "folded ending"])
def test_what_trls_divergence_refuses(pair: tuple[str, str], tmp_path: Path, case: str) -> None:
    """The teacher under its own prompt; over more tokens than the student has; with an ending of its own."""
    names = shutil.copytree(pair[0], tmp_path / "teacher"), pair[1]
    generator = HALF | {"teacher": str(names[0])}
    if case == "two prompts":
        generator["teacher_system_prompt"] = "sort"
    elif case == "padded vocabulary":
        wide = load(pair[0])
        wide.resize_token_embeddings(V + 16)
        wide.save_pretrained(names[0])
    else:
        (names[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    trainer = make_trainer("dense", pair, tmp_path, generator=generator, **ONE_STEP | ALL)
    batch = one_batch(trainer, PROMPTS)
    loss = loss_of(trainer, batch)
    if case != "folded ending":
        theta, wanted = exact(trainer, batch, 1.0, (str(names[0]), names[1]))
        wanted.mean().backward()
        assert loss == pytest.approx(wanted.mean().item(), rel=1e-4)
        assert_gradient(trainer.model, theta)
        return
    assert trainer.vllm_generation.pair.ending.folded == (3,)
    dense = batch["dense_log_teacher"][batch["completion_mask"].bool()]
    ruled_out = (batch["dense_ids"][batch["completion_mask"].bool()] == 3) & dense.isneginf()
    assert bool(ruled_out.any(1).all())  # the token counts with the tail, of which the teacher has next to nothing
    before = student_mass(trainer, batch, 3)
    for _ in range(5):
        loss_of(trainer, batch)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter -= 0.02 * parameter.grad
    assert student_mass(trainer, batch, 3) < 0.8 * before


@torch.no_grad()
def student_mass(trainer: Any, batch: dict[str, Tensor], token: int) -> float:
    """Mean probability of a token under the student, over a batch's completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    T = batch["completion_ids"].shape[1]
    probabilities = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -T - 1 : -1].softmax(-1)
    return float(probabilities[batch["completion_mask"].bool()][:, token].mean())


def test_an_evaluation_measures_the_distance(tmp_path: Path) -> None:
    """The student alone samples, its rows carry dense records, and the loss falls on the way to the teacher, to 0."""
    pair = make_untrained_pair(tmp_path, same_size=True)
    given = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4] * 4})}
    trainer = make_trainer("dense", pair, tmp_path, mixin=Watch, trainer=given, per_device_eval_batch_size=16, **ALL)
    begin, end, losses = load(pair[1]).state_dict(), load(pair[0]).state_dict(), []
    for way in (0.0, 0.5, 0.8, 1.0):
        trainer.model.load_state_dict({name: (1 - way) * begin[name] + way * end[name] for name in begin})
        logged = trainer.evaluate()
        losses.append(logged["eval_loss"])
        assert losses[-1] == pytest.approx(logged["eval_dense/kl_theta_teacher"], abs=1e-4)
        assert all(rollout.mixture.is_theta_only for rollout in trainer.rollouts)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.3
    assert abs(losses[-1]) < 1e-4


def test_a_small_vocabulary_is_taken_whole(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = make_trainer("dense", pair, tmp_path, dense_top_k=1000)
    assert one_batch(trainer, TEXTS[:4])["dense_ids"].shape[-1] == 2 * V


def test_settings_that_another_loss_reads_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind, settings, words in (
        (
            "dense",
            {"sampled_token_clip": 1.0},
            r"is 1\.0, and `loss='dense'` does not read it.*`loss='sampled_token'`",
        ),
        ("dense", {"teacher_model_revision": "v2"}, r"is 'v2', and `loss='dense'` does not.*`loss='divergence'`\."),
        ("divergence", {"dense_top_k": 8}, r"`dense_top_k` is 8, and `loss='divergence'` does not read it"),
        ("dense", {"trainer": {"teacher_model": pair[0]}}, "`loss` is 'dense', which reads the teacher from the"),
        ("dense", {"correction": "token_mask"}, "the divergence at a position is exact"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(kind, pair, tmp_path, **settings)
