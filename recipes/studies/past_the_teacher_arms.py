"""The arms that past_the_teacher.py compares, the places where they are run, and why these.

All cells of {loss} × {dense} × {rollouts} × {task} × {teacher} × {start} × {length} would be 20 000 runs. The design:

- At one place (`MAIN`: one right answer, teacher right in half of its samples, student in 6 %, 41 tokens) every
  combination of loss, dense term and rollouts: main effects of the three, and all of their interactions.
- From there one axis at a time, with the twelve arms of `CORE`, which hold the two interactions that decide what to
  recommend: rollouts × start (RAFT on four kinds of rollouts, GRPO on two, at each start) and loss × quality of the
  teacher (distillation, reward, both, at each teacher).
- The task with many right answers gets the axes of teacher and start, too: there a verified sample is no label.
- Controls at the main place: the same losses without a teacher, the teacher's own samples, groups of 1 to 8 at equal
  completions, and what others propose.
- On two short tasks, ways to credit single tokens from the records against GRPO's default and against a dense term.
- On a short task, distillation from dense records and from sampled tokens against the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from optimal_sampling_trl import Mixture
from runs import Line
from stacks import Rates, Setting, place_of
from stage import Arm

LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""All learning rates; an arm starts at three of them."""
SMALL, MIDDLE, LARGE = LADDER[1:4], LADDER[2:5], LADDER[3:6]

ALONE, MIXED, TEACHER = Mixture.theta_only(), Mixture(), Mixture.teacher_only()
ROLLOUTS = {"own": (ALONE, 1.0), "half": (MIXED, 0.5), "mixture": (MIXED, 0.0), "teacher": (TEACHER, 0.0)}
DENSE: dict[str, tuple[float, float | None]] = {
    "": (0.0, None), " + dense 0.1": (0.1, None), " + dense 1": (1.0, None), " + dense 1, faded": (1.0, 0.75)
}  # fmt: skip
"""The coefficient of KL(θ‖t), and the share of training by which it is gone."""


def loss_of(method: str, rollouts: str) -> dict[str, float]:
    """The terms of a method without the dense one: GRPO keeps its negatives on the student's own rollouts alone."""
    if method == "GRPO":
        return {"reward": 1.0, "positives": float(rollouts != "own")}
    return {"accepted": 1.0} if method == "RAFT" else {}


def tries_of(method: str, rollouts: str, dense: float) -> tuple[float, ...]:
    """Three rates about the best one of earlier runs at the main place."""
    if method == "GRPO":
        return SMALL if rollouts == "own" and dense < 1 else MIDDLE
    if method == "RAFT":
        return MIDDLE if rollouts in ("own", "teacher") else LARGE
    return LARGE


def factorial() -> dict[str, Arm]:
    """Every combination of loss, dense term and rollouts; distillation is the dense term alone, at 1."""
    arms = {}
    for rollouts, (mixture, share) in ROLLOUTS.items():
        distilled = {"divergence": 1.0}
        arms[f"Distillation, {rollouts}"] = Arm(distilled, mixture, share, tries=tries_of("", rollouts, 1.0))
        for method in ("GRPO", "RAFT"):
            for name, (dense, fade) in DENSE.items():
                terms = loss_of(method, rollouts) | {"divergence": dense}
                tries = tries_of(method, rollouts, dense)
                arms[f"{method}, {rollouts}{name}"] = Arm(terms, mixture, share, tries=tries, fade=fade)
    return arms


RAFT, DEFAULT, KL = {"accepted": 1.0}, {"reward": 1.0, "positives": 1.0}, {"divergence": 1.0}
FACTORIAL = factorial()
CONTROLS = {
    "GRPO, own, positive only": Arm(DEFAULT, ALONE, tries=SMALL),
    **{
        f"RAFT, mixture, groups of {size}": Arm(RAFT, theta_fraction=0.0, size=size, tries=MIDDLE)
        for size in (2, 4, 8)
    },
    **{f"RAFT, own, groups of {size}": Arm(RAFT, ALONE, size=size, tries=MIDDLE) for size in (2, 4, 8)},
    **{f"GRPO, half, groups of {size}": Arm(DEFAULT, size=size, tries=MIDDLE) for size in (2, 4)},
    **{f"GRPO, own, groups of {size}": Arm({"reward": 1.0}, ALONE, size=size, tries=SMALL) for size in (2, 4)},
    # The abstract alone was read of this, of AdaPrefix-GRPO and of the switch below.
    # arXiv:2608.31046: a fixed negative advantage, no teacher.
    "Improbable tokens down": Arm({"unlikely": 1.0}, ALONE, tries=SMALL),
    "GRPO, own, improbable tokens down": Arm({"reward": 1.0, "unlikely": 0.1}, ALONE, tries=SMALL),
    "RAFT, own, improbable tokens down": Arm({**RAFT, "unlikely": 0.1}, ALONE, tries=MIDDLE),
    # AdaPrefix-GRPO, arXiv:2607.07674: one length for all prompts of a run, since no prompt comes twice.
    "GRPO, own, reference prefix": Arm({"reward": 1.0}, ALONE, hints=True, tries=SMALL),
    "RAFT, own, reference prefix": Arm(RAFT, ALONE, hints=True, tries=MIDDLE),
    # arXiv:2609.04108: distil, then RL, switched by the validation.
    "Distillation, then GRPO, own": Arm(KL, ALONE, 1.0, then={"reward": 1.0}, tries=MIDDLE),
    "Distillation, then GRPO, half": Arm(KL, then=DEFAULT, tries=MIDDLE),
    "Distillation, then RAFT, own": Arm(KL, ALONE, 1.0, then=RAFT, tries=LARGE),
    "Distillation, then RAFT, mixture": Arm(KL, theta_fraction=0.0, then=RAFT, tries=LARGE),
    # Towards t·exp(R/β): the teacher's samples weighted; on the student's own, reward and dense term are its gradient.
    "Tilted 0.5, teacher": Arm(RAFT, TEACHER, 0.0, tilt=0.5, tries=MIDDLE),
    "Tilted 0.2, teacher": Arm(RAFT, TEACHER, 0.0, tilt=0.2, tries=MIDDLE),
    "Tilted 0.2, mixture": Arm(RAFT, theta_fraction=0.0, tilt=0.2, tries=LARGE),
    "RAFT, fixed 0.5": Arm(RAFT, Mixture("fixed", fixed_alpha=0.5), 0.0, tries=LARGE),
}
GRADED = {
    "RAFT, own, accept 1": Arm(RAFT, ALONE, accept=1.0, tries=MIDDLE),
    "RAFT, mixture, accept 1": Arm(RAFT, theta_fraction=0.0, accept=1.0, tries=LARGE),
    "RAFT, teacher, accept 1": Arm(RAFT, TEACHER, 0.0, accept=1.0, tries=MIDDLE),
    "RAFT, own, by reward": Arm(RAFT, ALONE, accept=None, tries=MIDDLE),
    "RAFT, mixture, by reward": Arm(RAFT, theta_fraction=0.0, accept=None, tries=LARGE),
}
OWN = {"reward": 1.0}
CREDIT = {
    # Three ways to credit single tokens (`stack_credit.py`), on the default's rollouts and on those of their sources.
    # RLSD's share of the teacher falls from 0.5 to 0 in 50 updates: half of a run of 100.
    "RLSD, half": Arm({**DEFAULT, "evidence": 0.5}, fade=0.5, tries=MIDDLE),
    "SRPO, half": Arm({**DEFAULT, "wrong_symmetric": 1.0}, tries=MIDDLE),
    "SRPO, half, KL(θ‖t)": Arm({**DEFAULT, "wrong_reverse": 1.0}, tries=MIDDLE),
    "SRPO, half, sampled tokens": Arm({**DEFAULT, "wrong_sampled": 1.0}, tries=MIDDLE),
    "RLAD, half": Arm({**DEFAULT, "anchored": 0.5}, tries=MIDDLE),
}
CREDIT_REST = {
    "RLSD, half, constant 1": Arm({**DEFAULT, "evidence": 1.0}, tries=MIDDLE),
    "SRPO, own": Arm({**OWN, "wrong_symmetric": 1.0}, ALONE, tries=MIDDLE),
    "RLSD, own": Arm({**OWN, "evidence": 0.5}, ALONE, fade=0.5, tries=SMALL),
    "RLAD, own": Arm({**OWN, "anchored": 0.5}, ALONE, tries=SMALL),
}
LIKELIEST = {f"Dense {k}": {"divergence": 1.0, "likeliest": float(k)} for k in (1, 4, 32)}
RECORDS = {
    f"{name}, {rollouts}": Arm(terms, *ROLLOUTS[rollouts], tries=LARGE)
    for rollouts in ("own", "mixture")
    for name, terms in (LIKELIEST | {"Sampled tokens": {"sampled": 1.0}}).items()
}
"""Distillation that reads less than the vocabulary: the likeliest tokens of dense records, or the sampled one."""
ARMS = FACTORIAL | CONTROLS | GRADED | CREDIT | CREDIT_REST | RECORDS
CORE = (
    "Distillation, own", "Distillation, mixture", "GRPO, own", "GRPO, half", "GRPO, own + dense 1",
    "GRPO, half + dense 1", "RAFT, own", "RAFT, half", "RAFT, mixture", "RAFT, teacher", "RAFT, own + dense 1",
    "RAFT, mixture + dense 1",
)  # fmt: skip
REST = tuple(arm for arm in FACTORIAL if arm not in CORE)
MAIN = Setting("sums-40", "teacher-50", "student-2", CORE, 3)
MANY = MAIN._replace(task="many-16")
OTHER_TEACHERS = tuple(MAIN._replace(teacher=name) for name in ("teacher-80", "teacher", "teacher-20"))
NOISY, GRADUAL = MAIN._replace(verifier="noisy"), MAIN._replace(verifier="graded", arms=CORE + tuple(GRADED))
AROUND = (*OTHER_TEACHERS, NOISY, GRADUAL)
"""Places that differ from the main one in the teacher or the verifier."""
FADED = ("RAFT, half + dense 1, faded", "RAFT, mixture + dense 1, faded")
SHORT = MAIN._replace(task="sums-10", arms=("GRPO, half", *CREDIT, "GRPO, half + dense 1"))
SHORT_MANY = SHORT._replace(task="many-8")
"""Places at which ways to credit tokens are compared: short enough for a CPU."""
FEW = 256
"""Different prompts where there are few: 37 epochs of them without groups."""


def settings(seeds: int = 3) -> list[Setting]:
    """The most informative first."""
    places = [
        MAIN,
        MANY,
        MAIN._replace(student="student-0"),
        *OTHER_TEACHERS,
        MAIN._replace(arms=REST),
        MAIN._replace(arms=tuple(CONTROLS)),
        MANY._replace(student="student-0"),
        MANY._replace(teacher="teacher-80"),
        NOISY,
        NOISY._replace(student="student-0"),
        GRADUAL,
        MAIN._replace(student="student-40"),
        MAIN._replace(task="sums-20"),
        MAIN._replace(prompts=FEW),
        MAIN._replace(task="sums-80"),
        MANY._replace(arms=REST),
        SHORT,
        SHORT_MANY,
        SHORT._replace(arms=(*CREDIT_REST, "GRPO, own")),
        MAIN._replace(task="sums-20", arms=(*RECORDS, "Distillation, own", "Distillation, mixture")),
        *(place._replace(arms=FADED) for place in AROUND),
    ]
    return [place._replace(seeds=seeds) for place in places]


def rates_with_edges(lines: Sequence[Line], arms: Mapping[str, Arm] = ARMS) -> Rates:
    """The rates of an arm at a place: its three, and one beyond for as long as the best of those run is at an end."""

    def rates(setting: Setting, arm: str) -> tuple[float, ...]:
        tries = arms[arm].rates
        while (more := beyond(tries, found.get((place_of(setting), arm), {}), setting.seeds)) is not None:
            tries = tuple(sorted((*tries, more)))
        return tries

    found: dict[tuple, dict[float, list[float]]] = {}
    for line in lines:
        if not line["stopped"]:
            ends = found.setdefault((place_of(line), line["arm"]), {})
            ends.setdefault(line["learning_rate"], []).append(line["curve"][-1][1])
    return rates


def beyond(tries: tuple[float, ...], ends: dict[float, list[float]], seeds: int) -> float | None:
    """The next rate of `LADDER` past the end where the best one stands; None where it stands inside, or runs miss."""
    if any(len(ends.get(rate, ())) < seeds for rate in tries):
        return None
    best = max(tries, key=lambda rate: mean(ends[rate]))
    place = LADDER.index(best) + (1 if best == tries[-1] else -1 if best == tries[0] else 0)
    return LADDER[place] if 0 <= place < len(LADDER) and LADDER[place] not in tries else None
