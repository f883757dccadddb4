"""The stack of the study of long tasks: one Llama's logits, exact draws, and the trainers' own gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import optimal_sampling_trl
import pair as embedded
import stack
import stack_losses
import stack_measure
from digit_tasks import Task
from helpers.training import BASE, PROMPTS, make_untrained_pair
from ladder import log_right
from optimal_sampling_trl import Mixture, OptimalSamplingGenerator
from optimal_sampling_trl.mixture import MixtureRows, mix

EOS = embedded.VOCABULARY.index(embedded.EOS)
LENGTH = 8
TERMS = {
    "GRPO": {"reward": 1.0},
    "GRPO with negatives": {"reward": 1.0, "negatives": 1.0},
    "GRPO with positives alone": {"reward": 1.0, "positives": 1.0},
    "GRPO, anchored credit": {"reward": 1.0, "anchored": 0.5},
    "GRPO as mentor": {"reward": 1.0, "own_baseline": 1.0},
    "GRPO as logit-fusion": {"reward": 1.0, "negatives": 1.0, "ratios": 1.0},
    "GRPO + sampled tokens": {"reward": 1.0, "sampled": 0.1},
    "divergence": {"divergence": 1.0},
    "divergence as trb": {"divergence": 1.0},
    "divergence as minillm": {"divergence": 1.0},
    "divergence as skd": {"forward": 1.0},
    "dense records": {"divergence": 1.0, "likeliest": 4.0},
    "sampled tokens": {"sampled": 1.0},
    **({"RAFT": {"accepted": 1.0}} if "RAFTTrainer" in dir(optimal_sampling_trl) else {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


def terms(**values: float) -> stack_losses.Losses:
    return stack_losses.Losses(*(torch.tensor([values.get(name, 0.0)]) for name in stack_losses.Losses._fields))


def test_a_stack_has_the_logits_of_each_of_its_models(folders: tuple[str, str]) -> None:
    """Two students that differ, at once and token by token from the cache."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders[1:] * 2]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    both = stack.Stack.load(folders[1], 2, "cpu")
    for name, parameter in models[1].named_parameters():
        both.weights[name][1] = parameter.detach()
    ids = torch.randint(3, 40, (2, 3, 12))
    wanted = torch.stack([model(part).logits for model, part in zip(models, ids)]).detach()
    torch.testing.assert_close(both.logits(ids, keep=12), wanted, rtol=1e-4, atol=1e-4)
    cache = both.cache(6, 12)
    parts = [both.logits(part, keep=1, cache=cache) for part in (ids[..., :5], *ids[..., 5:].split(1, dim=-1))]
    torch.testing.assert_close(torch.cat(parts, dim=2), wanted[:, :, 4:], rtol=1e-4, atol=1e-4)


def test_the_share_of_right_samples_is_the_probability_of_the_answer(folders: tuple[str, str]) -> None:
    """Summed over all completions of two tokens it is 1; the stack's mean is the model's."""
    task = Task("sums", 1)
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    prompt = task.sequences("test", 1, seed=0)[:, :2]
    every = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    ids = torch.cat([prompt.expand(1600, 2), every], dim=1)
    logits = model(ids).logits[:, -3:].detach()
    assert float(log_right(logits, ids, 2).exp().sum()) == pytest.approx(1.0, abs=1e-4)
    held_out = task.sequences("test", 50, seed=0)
    wanted = log_right(model(held_out).logits[:, -3:].detach(), held_out, 2).exp().mean()
    assert stack_measure.right(stack.Stack.load(folders[1], 3, "cpu"), held_out, 2).tolist() == pytest.approx(
        [float(wanted)] * 3
    )


def sampled(folders: tuple[str, str], mixture: Mixture, until: int, rows: int = 4) -> stack.Batch:
    teacher, student = (stack.Stack.load(folder, 1, "cpu") for folder in folders)
    prompts = torch.randint(3, 13, (1, rows, 5))
    every = MixtureRows.of([mixture] * rows)
    return stack.sample(student, teacher, prompts, every, torch.full((rows,), until), LENGTH, EOS)


@pytest.mark.parametrize(
    ("mixture", "until"),
    [
        (Mixture(), 5),
        (Mixture("trust_region", epsilon=0.05), 5),
        (Mixture.preset("mentor"), 5),
        (Mixture.preset("minillm"), 5),
        (Mixture.preset("skd"), LENGTH),
        (Mixture("top_k_swap", swap_top_k=2), 5),
        (Mixture.teacher_only(), 5),
        (Mixture(), 0),
    ],
)
def test_records_are_those_of_the_models(folders: tuple[str, str], mixture: Mixture, until: int) -> None:
    """α and the three log-probabilities of each token; after `until` tokens the student draws alone."""
    batch = sampled(folders, mixture, until)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    ids = torch.cat([batch.prompts, batch.ids], dim=-1)[0]
    teacher, theta = (model(ids).logits[:, 4:-1].detach().reshape(4 * LENGTH, -1) for model in models)
    alpha, log_q = mix(theta, teacher, mixture)
    alpha = alpha.view(4, LENGTH)
    torch.testing.assert_close(batch.alpha[0][:, :until], alpha[:, :until], rtol=0, atol=1e-4)
    assert not batch.alpha[0][:, until:].any()
    token = batch.ids[0].reshape(-1, 1)
    log_theta = theta.log_softmax(-1).gather(1, token).view(4, LENGTH)
    torch.testing.assert_close(batch.log_theta[0], log_theta, rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.log_q[0][:, until:], log_theta[:, until:], rtol=0, atol=1e-4)
    log_q = log_q.gather(1, token).view(4, LENGTH)
    torch.testing.assert_close(batch.log_q[0][:, :until], log_q[:, :until], rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.teacher[0].view(4 * LENGTH, -1), teacher.log_softmax(-1), rtol=0, atol=1e-4)


def test_without_a_teacher_the_same_tokens_are_drawn(folders: tuple[str, str]) -> None:
    """A stack in which nothing reads the teacher has the tokens and masks of one in which it reads them afterwards."""
    student, teacher = stack.Stack.load(folders[1], 2, "cpu"), stack.Stack.load(folders[0], 1, "cpu")
    prompts, rows = torch.randint(3, 13, (2, 64, 5)), MixtureRows.of([Mixture.theta_only()] * 128)
    torch.manual_seed(0)
    read = stack.sample(student, teacher, prompts, rows, torch.zeros(128), LENGTH, EOS)
    torch.manual_seed(0)
    alone = stack.sample(student, None, prompts, rows, torch.full((128,), LENGTH), LENGTH, EOS)
    assert torch.equal(read.ids, alone.ids)
    assert len(alone.ids.unique()) > 10
    before = torch.cat([torch.ones(2, 64, 1), (alone.ids != EOS).cumprod(-1)[..., :-1]], dim=-1)
    assert torch.equal(alone.mask, before)
    assert 0 < float(alone.mask.mean()) < 1
    assert not alone.log_teacher.any()


class Look(TrainerCallback):
    """Keeps the gradient of the first update, before it is clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters()}


def parity(prompts: Any, completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that the rollouts of untrained models disagree on."""
    return [float(len(completion) % 2) for completion in completions]


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_the_trainers(folders: tuple[str, str], tmp_path: Path, name: str) -> None:
    """One step of a trainer on its own rollouts, and the stack's loss on the same."""
    is_grpo, is_raft, look, values = name.startswith("GRPO"), name == "RAFT", Look(), TERMS[name]
    settings = BASE | {"output_dir": str(tmp_path), "max_steps": 1, "gradient_accumulation_steps": 1}
    settings |= {"per_device_train_batch_size": 8, "max_completion_length": LENGTH, "max_grad_norm": 1e9}
    if is_grpo:
        kept = "none" if "negatives" in values else "all" if "positives" in values else "mixture"
        special = {"num_generations": 4, "positive_only": kept}
        special["distillation_coefficient"] = values.get("sampled", 0.0)
        special["credit"] = "anchored" if "anchored" in values else "completion"
    else:
        special = {} if is_raft else {"loss": "sampled_token" if "sampled" in values else "divergence"}
        if "likeliest" in values:
            special = {"loss": "dense", "dense_top_k": int(values["likeliest"])}
    if " as " in name:
        special = ({"num_generations": 4} if is_grpo else {}) | {"preset": name.partition(" as ")[2]}
    kind = "GRPO" if is_grpo else "RAFT" if is_raft else "Distillation"
    trainer = getattr(optimal_sampling_trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32),
        args=getattr(optimal_sampling_trl, f"{kind}Config")(**settings, **special),
        generator=OptimalSamplingGenerator(folders[0], backend="transformers"),
        processing_class=AutoTokenizer.from_pretrained(folders[1]),
        train_dataset=Dataset.from_dict({"prompt": [text for text in PROMPTS if len(text) == 11] * 4}),
        callbacks=[look],
        **({"reward_funcs": parity} if is_grpo or is_raft else {}),
    )
    trainer.train()
    rollouts = list(trainer.rollouts)
    T = max(len(rollout.completion_ids) for rollout in rollouts)

    def padded(field: str) -> torch.Tensor:
        rows = [torch.as_tensor(getattr(rollout, field)) for rollout in rollouts]
        return torch.stack([torch.nn.functional.pad(row, (0, T - len(row))) for row in rows])[None]

    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    prompts = torch.tensor([rollout.prompt_ids for rollout in rollouts])[None]
    student, teacher = (stack.Stack.load(folder, 1, "cpu") for folder in (folders[1], folders[0]))
    for weight in student.weights.values():
        weight.requires_grad_()
    ids = padded("completion_ids")
    logits = teacher.logits(torch.cat([prompts, ids], dim=-1), keep=T + 1)[:, :, :-1]
    records = [padded(field) for field in ("alpha", "log_q", "log_theta", "log_teacher")]
    mask = (torch.arange(T) < lengths[:, None]).float()[None]
    batch = stack.Batch(prompts, ids, mask, *records, logits.log_softmax(-1))
    mixed = torch.tensor([not rollout.mixture.is_theta_only for rollout in rollouts])
    rewards = torch.tensor(parity(None, [rollout.text for rollout in rollouts]))[None]
    assert not (is_grpo or is_raft) or 0 < float(rewards.mean()) < 1
    loss = stack_losses.loss(student, batch, rewards, mixed[None, :, None].expand(1, 8, T), terms(**values), group=4)
    found = stack_losses.gradients(student, loss)
    assert found.keys() == look.gradients.keys()
    assert max(float(gradient.abs().max()) for gradient in look.gradients.values()) > 1e-3
    for weight, gradient in look.gradients.items():
        first = 1 if "embed_tokens" in weight else 0  # transformers learns nothing from a pad that was drawn
        torch.testing.assert_close(found[weight][0][first:], gradient[first:], rtol=1e-3, atol=1e-5)


def test_adam_is_torchs_with_a_rate_and_a_clip_for_each_student() -> None:
    weights = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 5)}
    alone = [[w[row].clone().requires_grad_() for w in weights.values()] for row in range(2)]
    rates = (1e-2, 1e-3)
    optimizers = [torch.optim.Adam(part, lr=rate) for part, rate in zip(alone, rates)]
    adam = stack_losses.Adam(weights, torch.tensor(rates))
    for scale in (5.0, 0.01, 1.0):
        gradient = {name: scale * torch.randn_like(w) for name, w in weights.items()}
        for row, (part, optimizer) in enumerate(zip(alone, optimizers)):
            for parameter, one in zip(part, gradient.values()):
                parameter.grad = one[row].clone()
            torch.nn.utils.clip_grad_norm_(part, 1.0)
            optimizer.step()
        adam.step(gradient, 1.0)
    for row, part in enumerate(alone):
        for parameter, weight in zip(part, weights.values()):
            torch.testing.assert_close(weight[row], parameter.detach(), rtol=1e-4, atol=1e-6)
