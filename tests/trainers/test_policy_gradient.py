"""GRPO and RLOO: corrections of the mixture's rows, and advantages that are dropped."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from helpers.training import (
    KINDS,
    TEXTS,
    Watch,
    make_trainer,
    one_batch,
    rows_of,
)
from optimal_sampling_trl.losses import CORRECTIONS

RL = ("grpo", "rloo")


@pytest.mark.parametrize("name", CORRECTIONS)
def test_grpo_multiplies_trls_ratio_on_mixture_rows(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    level, _, shape = name.partition("_")
    settings: dict[str, Any] = {"truncate": {"clip_max": 1.3}, "mask": {"clip_max": 1.3, "clip_min": 0.2}}.get(
        shape, {}
    )
    settings |= ({"gamma": 0.5} if shape == "luffy" else {}) | ({"window": 2} if level == "prefix" else {})
    details = {f"correction_{detail}": value for detail, value in settings.items()}
    trainer = make_trainer("grpo", pair, tmp_path, correction=name, **details)
    batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
    for row, (_, _, records) in enumerate(rows_of(batch)):
        ratios = (records["log_theta"].double() - records["log_q"].double()).exp().tolist()
        for i in range(len(ratios)):
            product = {"token": ratios[i], "prefix": np.prod(ratios[max(0, i - 1) : i + 1]), "none": 1.0}
            w = product.get(level, np.prod(ratios))
            w = {"truncate": min(w, 1.3), "mask": w * (0.2 <= w <= 1.3), "luffy": w / (w + 0.5)}.get(shape, w)
            wanted = w if batch["mixture_rows"][row] else 1.0
            assert float(batch["importance_sampling_ratio"][row, -1 if level == "none" else i]) == pytest.approx(
                wanted, rel=1e-3, abs=1e-4
            )
    if name != "none":
        mixed = batch["importance_sampling_ratio"][batch["mixture_rows"]]
        assert float((mixed - 1).abs().max()) > 0.05


class Rounds:
    """Goes before a trainer's class: its engine's log θ and log q are off, as bfloat16 makes them, by far more."""

    def _build_generation(self, **trl_arguments: Any) -> Any:
        generation = super()._build_generation(**trl_arguments)  # type: ignore[misc]
        exact, noise = generation.backend.generate, torch.Generator().manual_seed(0)

        def rounded(requests: Any) -> Any:
            rollouts = exact(requests)
            for rollout in rollouts:
                error = 0.3 * torch.randn(len(rollout.log_q), generator=noise)
                rollout.log_theta.add_(error)
                rollout.log_q.add_(error)
            return rollouts

        generation.backend.generate = rounded
        return generation


@pytest.mark.parametrize("kind", KINDS)
def test_weight_one_is_exact_beside_an_engine_that_rounds(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The default trains each completion with weight 1, whatever the engine's error: no bit of the gradient moves."""
    gradients = []
    for mixin in (None, Rounds):
        trainer = make_trainer(kind, pair, tmp_path, mixin=mixin, log_theta_tolerance=np.inf)
        batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    if kind in RL:
        difference = trainer._metrics["train"]["engine/log_theta_difference"][0]
        assert difference == pytest.approx(0.24 if kind == "grpo" else 0.08, rel=0.5)  # it is seen, and not corrected
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(("correction", "mode"), [("none", "sequence_mask"), ("token_truncate", "token_truncate")])
def test_trls_ratio_multiplies_ours_where_it_is_asked_for(
    pair: tuple[str, str], tmp_path: Path, correction: str, mode: str
) -> None:
    settings = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode}
    settings["log_theta_tolerance"] = np.inf
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Rounds, correction=correction, **settings)
    batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
    difference, found = batch["old_per_token_logps"] - batch["log_theta"], set()
    for row, mask in enumerate(batch["completion_mask"].bool()):
        ratio = difference[row][mask].exp()
        if mode == "sequence_mask":
            ratio = ratio.prod().expand_as(ratio)
            ratio = ratio * (ratio <= 3)
        weight = (batch["log_theta"] - batch["log_q"])[row][mask].exp().clamp(max=3)
        mixed = correction != "none" and batch["mixture_rows"][row]
        wanted = ratio.clamp(max=3) * weight if mixed else ratio.clamp(max=3)
        got = batch["importance_sampling_ratio"][row, : len(wanted)].expand_as(wanted)
        assert torch.allclose(got, wanted, rtol=1e-4)
        found.add(bool((got - 1).abs().max() > 0.05))
    assert True in found


def test_details_of_trls_ratio_do_no_harm_where_it_does_not_count(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL computes its ratio for the metrics all the same, and would fail on a truncation without a bound."""
    settings = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None}
    with pytest.warns(UserWarning, match=r"`vllm_importance_sampling_mode` is 'token_truncate' and does nothing here"):
        trainer = make_trainer("grpo", pair, tmp_path, **settings)
    batch = one_batch(trainer, TEXTS[:1] * 4)
    assert bool((batch["importance_sampling_ratio"] == 1).all())
    with pytest.raises(ValueError, match=r"^Unknown value of `vllm_importance_sampling_mode` 'token'\. Known: "):
        make_trainer("grpo", pair, tmp_path, vllm_importance_sampling_mode="token")


def test_an_evaluation_has_weight_one(pair: tuple[str, str], tmp_path: Path) -> None:
    class Both(Watch, Rounds):
        pass

    given = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Both, trainer=given, log_theta_tolerance=np.inf)
    trainer.evaluate()
    for _, output, _ in trainer.generations:
        assert bool((output["importance_sampling_ratio"] == 1).all())


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.3}])
def test_a_truncation_is_no_defect_of_the_engine(pair: tuple[str, str], tmp_path: Path, settings: Any) -> None:
    """TRL's ratio is of the trainer against the engine; of the truncated q it would drop the student's rows."""
    trainer = make_trainer("grpo", pair, tmp_path, **settings)
    batch = one_batch(trainer, [text for text in TEXTS[:4] for _ in range(4)])
    assert set(batch["mixture_rows"].tolist()) == {True, False}
    assert float((batch["importance_sampling_ratio"] - 1).abs().max()) < 1e-4


def test_completions_that_no_function_scores_count_for_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    def some(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if row % 4 in (0, 3) else 1.0 + row // 4 for row in range(len(completions))]

    def none(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    for rewards, wanted in ((some, [1.5, 1.5, 0.0]), (none, [np.nan, np.nan, 0.0])):
        trainer = make_trainer("grpo", pair, tmp_path, trainer={"reward_funcs": rewards})
        one_batch(trainer, [text for text in TEXTS[:2] for _ in range(4)])
        log = trainer._metrics["train"]
        names = ("mixture/reward_theta", "mixture/reward_mixture", "mixture/groups_with_signal")
        assert [log[name][0] for name in names] == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("kind", RL)
def test_positive_only(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The same rollouts: "none", TRL's advantages; "mixture", its negatives are 0; the default, all are."""
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    off = one_batch(make_trainer(kind, pair, tmp_path, positive_only="none"), prompts)
    on, everywhere = (
        one_batch(make_trainer(kind, pair, tmp_path, **settings), prompts)
        for settings in ({"positive_only": "mixture"}, {})
    )
    assert torch.equal(on["completion_ids"], off["completion_ids"])
    assert torch.equal(everywhere["completion_ids"], off["completion_ids"])
    mixed = off["mixture_rows"]
    assert bool((off["advantages"][mixed] < 0).any())
    assert bool((off["advantages"][~mixed] < 0).any())
    wanted = torch.where(mixed & (off["advantages"] < 0), 0.0, off["advantages"])
    assert torch.equal(on["advantages"], wanted)
    assert torch.equal(everywhere["advantages"], off["advantages"].clamp(min=0))


def test_the_students_own_completions_are_the_baseline(pair: tuple[str, str], tmp_path: Path) -> None:
    """By hand from the rewards: the student's half over its own mean and deviation, the mixture's over that mean."""
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    trainer = make_trainer("grpo", pair, tmp_path, baseline="own", positive_only="mixture", num_generations=4)
    batch = one_batch(trainer, prompts)
    for rows, mixed, got in zip(
        trainer.rewards.split(4), batch["mixture_rows"].split(4), batch["advantages"].split(4)
    ):
        own, helped = rows[~mixed], rows[mixed]
        assert len(own) == len(helped) == 2
        assert torch.allclose(got[~mixed], (own - own.mean()) / (own.std() + 1e-4), atol=1e-5)
        assert torch.allclose(got[mixed], (helped - own.mean()).clamp(min=0), atol=1e-6)
    assert bool((batch["advantages"][batch["mixture_rows"]] > 0).any())
    assert bool((batch["advantages"][~batch["mixture_rows"]] < 0).any())


def test_the_mixtures_weight_falls_and_ends_with_the_student_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    """Half a cosine over two updates: 1, 1/2, and from the third update on all completions are the student's."""
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    plain = one_batch(make_trainer("grpo", pair, tmp_path), prompts)
    trainer = make_trainer("grpo", pair, tmp_path, mixture_weight_steps=2)
    for step, weight in enumerate((1.0, 0.5)):
        trainer.state.global_step = step
        batch = one_batch(trainer, prompts)
        assert torch.equal(batch["completion_ids"], plain["completion_ids"])
        factor = torch.where(plain["mixture_rows"], weight, 1.0)
        assert torch.allclose(batch["advantages"], factor * plain["advantages"])
    trainer.state.global_step = 2
    assert not bool(one_batch(trainer, prompts)["mixture_rows"].any())


@pytest.mark.parametrize(
    ("settings", "generator", "wanted"),
    [
        ({"baseline": "theta"}, {}, r"^Unknown value of `baseline` 'theta'\. Known: group, own\."),
        (
            {"baseline": "own", "scale_rewards": "batch"},
            {},
            r"`baseline` is 'own' with `scale_rewards` 'batch' .*wanted",
        ),
        ({"baseline": "own"}, {"theta_fraction": 0.0}, r"`baseline` is 'own' and the student samples no completion"),
        ({"mixture_weight_steps": 0}, {}, r"`mixture_weight_steps` is 0; wanted a whole number of at least 1"),
        (
            {"credit": "anchored", "num_iterations": 2},
            {},
            r"`credit` is 'anchored' with .* `num_iterations` 2, .*wanted one update of each batch",
        ),
        (
            {"importance_sampling_level": "sequence", "credit": "anchored", "correction": "token_mask"},
            {},
            r"is 'sequence' with `loss_type` 'dapo' and `credit` 'anchored', `correction` 'token_mask': each token",
        ),
        (
            {"importance_sampling_level": "sequence", "loss_type": "luspo", "distillation_coefficient": 0.5},
            {},
            r"'luspo' and `distillation_coefficient` 0\.5: .*take `loss_type` 'cispo' or 'vespo'",
        ),
        (
            {"loss_type": "dr_grpo", "max_completion_length": None, "generation_kwargs": {"max_tokens": 6}},
            {},
            r"`max_completion_length` is None and `loss_type` 'dr_grpo', which divides by it; wanted",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    pair: tuple[str, str], tmp_path: Path, settings: Any, generator: Any, wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        make_trainer("grpo", pair, tmp_path, generator=generator, **settings)


def test_settings_that_collapsed_are_warned_of_once(pair: tuple[str, str], tmp_path: Path) -> None:
    negatives = {"correction": "token_truncate", "positive_only": "none"}
    vespo = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("grpo", negatives, {"theta_fraction": 0.0}, r"match of 0\.14, .* 0\.44\. Leave `positive_only` at 'all'"),
        ("grpo", {"correction": "prefix_truncate"}, {}, r"prefix ratios to 0\.13 at most"),
        ("rloo", {"correction": "sequence_mask"}, {}, r"exact match of 0\.00 at every learning rate.*Use 'none'"),
        ("grpo", vespo, {}, r"`loss_type='vespo'` .*\.045 -> \.000.*\(0\.43\)"),
        ("grpo", {"beta": 0.1}, {}, r"`beta` is 0\.1 .*Leave them at 0 and None"),
    ]
    for kind, settings, generator, message in cases:
        with pytest.warns(UserWarning, match=message) as caught:
            make_trainer(kind, pair, tmp_path, generator=generator, **settings)
        ours = [w for w in caught if re.search(message, str(w.message))]
        assert len(ours) == 1
        assert Path(ours[0].filename).name == "training.py", ours[0].filename  # the line that builds the trainer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer("grpo", pair, tmp_path, correction="token_truncate")
        make_trainer("grpo", pair, tmp_path, correction="token_truncate", generator={"theta_fraction": 0.0})
        for kind in RL:  # a penalty on the student's own tokens is TRL's
            make_trainer(kind, pair, tmp_path, beta=0.1, generator={"theta_fraction": 1.0})
    assert not [w for w in caught if "on the embedded pair" in str(w.message) or "`beta` is" in str(w.message)]


@pytest.mark.parametrize("credit", ["completion", "anchored"])
def test_credit_of_tokens_reaches_the_loss_that_takes_it_at_the_level_of_a_sequence(
    pair: tuple[str, str], tmp_path: Path, credit: str
) -> None:
    """The gradient by each token's log θ is its own advantage, where TRL's ratio is one of the completion."""
    settings: dict[str, Any] = {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 5.0}
    trainer = make_trainer("grpo", pair, tmp_path, credit=credit, gradient_accumulation_steps=1, **settings)
    batch = one_batch(trainer, [TEXTS[0]] * 4)
    leaves: list[torch.Tensor] = []
    compute = trainer._get_per_token_logps_and_entropies

    def from_leaves(*positional: Any, **keywords: Any) -> Any:
        log_theta, *rest = compute(*positional, **keywords)
        leaves.append(log_theta.detach().requires_grad_())
        return leaves[-1], *rest

    trainer._get_per_token_logps_and_entropies = from_leaves
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()
    mask = batch["completion_mask"]
    advantages = (batch["advantages"].view(len(mask), -1) * mask).expand_as(mask)
    assert torch.allclose(leaves[0].grad * mask.sum(), -advantages, atol=1e-4)
    spread = advantages.max(1).values - advantages.where(mask.bool(), torch.inf).min(1).values
    assert (float(spread.max()) > 0.01) == (credit == "anchored")


def test_groups_with_signal_are_those_of_the_rewards_that_rloo_clips(pair: tuple[str, str], tmp_path: Path) -> None:
    prompts = [text for text in TEXTS[:4] for _ in range(4)]
    for bounds, none in (((-1.0, 0.0), True), (None, False)):
        trainer = make_trainer("rloo", pair, tmp_path, reward_clip_range=bounds)
        batch = one_batch(trainer, prompts)
        (share,) = trainer._metrics["train"]["mixture/groups_with_signal"]
        assert (share == 0) == (not bool(batch["advantages"].any())) == none
