"""Steps of training of a stack of students: the arms, and the state that each run is in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimal_sampling_trl import Mixture
from optimal_sampling_trl.losses import mixture_weight
from optimal_sampling_trl.mixture import MixtureRows
from optimal_sampling_trl.trainers.entropy_scale import next_scale
from stack import Given
from stack_losses import Losses

BATCH, GROUP = 64, 8
SMOOTHING = 0.9
FADING = (
    "sampled", "divergence", "forward", "evidence", "anchored", "wrong_symmetric", "wrong_reverse", "wrong_sampled",
)  # fmt: skip
"""Terms that read the teacher, and may fade."""
HINT, HINT_RATE, WITHDRAWN = 0.5, 0.05, 0.75
"""A reference prefix starts at this share of the answer, moves by this rate, and is gone at this share of training."""
GAIN, PATIENCE = 0.01, 2
"""The first phase ends after this many looks at the validation without this gain."""


class Arm(NamedTuple):
    """A way to train.

    Args:
        terms: coefficients of the loss, by the names of `stack_losses.Losses`.
        mixture: what the rollouts are sampled from.
        theta_fraction: the share of a group that is the student's own; None grows from 0.5 to 1 with its success.
        schedule: the share of training over which the mixture is annealed to the student; "success" anneals by the
            success rate of the student's own completions instead.
        prefix: the share of a completion that the mixture draws before the student goes on; "random": a share drawn
            anew for each completion, uniform in [0, 1].
        size: completions of one prompt; None is `GROUP` with a reward's advantages, 1 without.
        tries: learning rates; None has some that fit most arms.
        fade: the share of training by which the terms of the teacher (`FADING`) have gone to 0.
        then: the terms of a second phase, which begins when the validation no longer improves.
        accept: the reward that a completion needs to count in filtered fine-tuning; 0.0 takes any above 0, None
            weighs each by its reward.
        tilt: β of the weights exp((R - 1)/β) in its place: fine-tuning towards t·exp(R/β) on the teacher's samples.
        hints: whether completions begin with tokens of a right answer, as many as keep the success at one half.
        withdraw: the share of training by which the mixture's advantages have lost all weight, along half a cosine;
            the student then samples alone.
        quantile: of the student's entropies in a batch, to which the entropy gate's scale is set for the next one.
    """

    terms: dict[str, float]
    mixture: Mixture = Mixture()
    theta_fraction: float | None = 0.5
    schedule: float | str | None = None
    prefix: float | str = 1.0
    size: int | None = None
    tries: tuple[float, ...] | None = None
    fade: float | None = None
    then: dict[str, float] | None = None
    accept: float | None = 0.0
    tilt: float | None = None
    hints: bool = False
    withdraw: float | None = None
    quantile: float | None = None

    @property
    def group(self) -> int:
        """Completions of one prompt in the first phase."""
        return self.size or group_of(self.terms)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that it is tried at: some with a reward bear smaller steps alone."""
        if self.tries is not None:
            return self.tries
        return (1e-4, 3e-4, 1e-3, 3e-3) if self.terms.get("reward") else (3e-4, 1e-3, 3e-3)


def group_of(terms: dict[str, float]) -> int:
    """Completions of one prompt: without advantages there are no groups."""
    return GROUP if terms.get("reward") else 1


class Stage:
    """The mixtures and losses of a stack of runs at each step, by the state that each run is in."""

    def __init__(self, arms: list[Arm], length: int, device: str, batch: int = BATCH) -> None:
        self.arms, self.length, self.device, self.batch = arms, length, device, batch
        self.success = torch.zeros(len(arms))  # of the student's own completions, smoothed
        self.groups = torch.tensor([arm.group for arm in arms])
        self.rows = MixtureRows.of([arm.mixture for arm in arms for _ in range(batch)], device)
        self.scales = [arm.mixture.entropy_scale for arm in arms]
        self.second = torch.zeros(len(arms), dtype=torch.bool)  # whether a run is in its second phase
        self.best, self.stalled = torch.zeros(len(arms)), torch.zeros(len(arms))
        self.hint = torch.full((len(arms),), HINT)
        every = [term for arm in arms for term in (arm.terms.keys() | (arm.then or {}).keys())]
        self.mixes = any(not arm.mixture.is_theta_only for arm in arms)
        self.reads_teacher = self.mixes or bool(set(every) & set(FADING))
        weighing = [(arm.accept or 0.0, arm.accept is None, arm.tilt or 0.0) for arm in arms]
        self.accept, self.weighs, self.tilt = torch.tensor(weighing, device=device).T[..., None]  # (S, 1) each
        self._mixtures: tuple[MixtureRows, Tensor] | None = None  # where they are the same at each step

    def losses(self, progress: float) -> Losses:
        """The coefficients of each run's loss."""
        table = []
        for arm, second in zip(self.arms, self.second.tolist(), strict=True):
            terms = (arm.then or arm.terms) if second else arm.terms
            kept = 1.0 if arm.fade is None else max(1 - progress / arm.fade, 0.0)
            terms = terms | {"withdrawn": 1 - mixture_weight(progress, arm.withdraw)}
            table.append([terms.get(name, 0.0) * (kept if name in FADING else 1.0) for name in Losses._fields])
        return Losses(*torch.tensor(table, device=self.device).unbind(1))

    def sizes(self) -> Tensor:
        """The group (S,) that advantages are taken in; any where a run takes none."""
        return torch.where(self.groups > 1, self.groups, GROUP)

    def weights(self, rewards: Tensor) -> Tensor:
        """The weight (S, B) of each completion in filtered fine-tuning."""
        accepted = ((rewards > 0) & (rewards >= self.accept)).float()
        tilted = torch.exp((rewards - 1) / self.tilt.clamp(min=1e-9))
        return torch.where(self.tilt > 0, tilted, torch.where(self.weighs > 0, rewards, accepted))

    def given(self, answers: Tensor, progress: float) -> Given | None:
        """The tokens of right answers (S, B, T) that completions begin with; None where no arm has any."""
        if not any(arm.hints for arm in self.arms):
            return None
        cap = min(max((WITHDRAWN - progress) / (1 - WITHDRAWN), 0.0), 1.0)
        share = torch.minimum(self.hint, torch.tensor(cap)) * torch.tensor([arm.hints for arm in self.arms])
        count = torch.ceil(share * (self.length - 1)).to(self.device)
        return Given(answers, count[:, None].expand(-1, self.batch).contiguous())

    def kept(self, progress: float) -> Tensor:
        """Return how much of each run's mixture is there, in [0, 1]: 1 less `Mixture.anneal`'s share."""
        shares = [
            float(success) if arm.schedule == "success" else min(progress / float(arm.schedule), 1.0)
            if arm.schedule is not None else 0.0
            for arm, success in zip(self.arms, self.success, strict=True)
        ]  # fmt: skip
        return 1 - torch.tensor(shares)

    def mixtures(self, progress: float) -> tuple[MixtureRows, Tensor]:
        """The mixture of each row, and how many of its tokens come from it (S, B); 0 in the student's own rows."""
        if self._mixtures is None:
            self._mixtures = self._make_mixtures(progress)
        found = self._mixtures
        if any(
            arm.theta_fraction is None
            or arm.prefix == "random"
            or {arm.schedule, arm.withdraw, arm.quantile} != {None}
            for arm in self.arms
        ):
            self._mixtures = None
        return found

    def _make_mixtures(self, progress: float) -> tuple[MixtureRows, Tensor]:
        kept = self.kept(progress)
        until = torch.zeros(len(self.arms), self.batch)
        for place, arm in enumerate(self.arms):
            share = 0.5 + 0.5 * float(self.success[place]) if arm.theta_fraction is None else arm.theta_fraction
            block = int(self.groups[place]) if self.groups[place] > 1 else GROUP
            count = int(share * block + 0.5)
            share = torch.rand(self.batch) if arm.prefix == "random" else torch.full((self.batch,), float(arm.prefix))
            until[place] = torch.ceil(share * self.length) * (torch.arange(self.batch) % block >= count)
            withdrawn = arm.withdraw is not None and progress >= arm.withdraw
            if arm.mixture.is_theta_only or kept[place] == 0 or withdrawn:
                until[place] = 0
        shrunk = kept.repeat_interleave(self.batch).to(self.rows.alpha_min)
        annealed = self.rows._replace(
            alpha_min=self.rows.alpha_min * shrunk, alpha_max=self.rows.alpha_max * shrunk,
            fixed_alpha=self.rows.fixed_alpha * shrunk, epsilon=self.rows.epsilon * shrunk,
            entropy_scale=torch.tensor(self.scales).repeat_interleave(self.batch).to(self.rows.entropy_scale),
        )  # fmt: skip
        trust = torch.tensor([arm.mixture.method == "trust_region" for arm in self.arms]).repeat_interleave(self.batch)
        trust = trust.to(self.device)  # annealed in its budget alone
        annealed = annealed._replace(alpha_max=torch.where(trust, self.rows.alpha_max, annealed.alpha_max))
        return annealed, until.to(self.device)

    def note(self, rewards: Tensor, from_theta: Tensor) -> None:
        """Update the success of the student's own completions, where a run has any, and the length of the hints."""
        rewards, from_theta = rewards.cpu(), from_theta.cpu()
        count = from_theta.sum(1)
        new = (rewards * from_theta).sum(1) / count.clamp(min=1)
        self.success = torch.where(count > 0, SMOOTHING * self.success + (1 - SMOOTHING) * new, self.success)
        self.hint = (self.hint + HINT_RATE * (0.5 - rewards.mean(1))).clamp(0, 1)

    def note_alpha(self, alpha: Tensor, mixed: Tensor) -> None:
        """Set the scale of the entropy gates for the next batch from α (S, B, T) of the tokens that are `mixed`."""
        for place, arm in enumerate(self.arms):
            if arm.quantile is not None:
                drawn = alpha[place][mixed[place]]
                self.scales[place] = next_scale(drawn, self.scales[place], arm.quantile, arm.mixture.entropy_scale)

    def validate(self, right: Tensor) -> None:
        """Take a look at the validation (S,): a run whose first phase no longer improves enters its second."""
        better = right > self.best + GAIN
        self.best = torch.where(better, right, self.best)
        self.stalled = torch.where(better, 0.0, self.stalled + 1)
        has_second = torch.tensor([arm.then is not None for arm in self.arms])
        self.second |= has_second & (self.stalled >= PATIENCE)
        groups = [arm.size or group_of(arm.then or {}) for arm in self.arms]
        self.groups = torch.where(self.second, torch.tensor(groups), self.groups)
        self._mixtures = None
