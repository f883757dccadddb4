"""Numbers of a pair of models, its prompts and its reward, before anything is trained: one page.

The same prompts are sampled at fixed α from the student (0) to the teacher (1), and at the α that is solved. Each way
has a row: how often the reward accepts, for how many prompts at all, how far the samples are from either model, and
how long a token takes. The probe gives no advice: docs/probe.md says what was tried to predict the gain of training.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import metrics
from .losses import accept_rewards
from .mixture import Mixture
from .options import check_number, check_whole, shown
from .rollouts.dense import Dense

if TYPE_CHECKING:
    from .generate import OptimalSamplingV1
    from .rollouts.rollout import Rollout

MIXTURES = {
    "student": Mixture.theta_only(),
    "α = 0.13": Mixture("fixed", fixed_alpha=0.13),
    "α = 0.25": Mixture("fixed", fixed_alpha=0.25),
    "α = 0.5": Mixture("fixed", fixed_alpha=0.5),
    "α solved": Mixture(),
    "teacher": Mixture.teacher_only(),
}
"""The ways of sampling that are probed, by the name of their row."""
GREEDY = ("student", "α solved", "teacher")
"""Those whose likeliest tokens are tried as well."""
LIKELIEST = 8
"""Number of each model's likeliest tokens that are compared; all of a smaller vocabulary."""

Reward = Callable[..., Sequence[float | None]]
"""A reward as TRL's trainers take it: of `prompts`, `completions`, `completion_ids` and the dataset's columns."""


@dataclass(frozen=True)
class ProbeRow:
    """One way of sampling; NaN stands where there is nothing to average.

    Args:
        name: key of `MIXTURES`.
        alpha: mean α of the tokens.
        success: share of the completions that the reward accepts.
        any_success: share of the prompts with an accepted completion: pass@n, for n completions of a prompt.
        signal: share of the prompts with completions of both kinds, which give a policy gradient something to learn.
        greedy: share of the prompts whose likeliest tokens are accepted; NaN where that was not tried.
        kl_theta, kl_teacher: estimates of KL(q‖θ) and KL(q‖t), in nats a token.
        acceptance: mean of min(1, θ/q): the share of the student's drafts that speculative sampling would accept.
        seconds: wall time of a token, all completions sampled together, after a token of each prompt was sampled.
    """

    name: str
    alpha: float
    success: float
    any_success: float
    signal: float
    greedy: float
    kl_theta: float
    kl_teacher: float
    acceptance: float
    seconds: float


@dataclass(frozen=True)
class Probe:
    """Hold the measurements of a pair.

    Args:
        rows: one for each of `MIXTURES`.
        overlap: Σ min(θ, t), the mass that both models give the same tokens, a mean over the student's tokens.
        likeliest: share of the student's k likeliest tokens that are among the teacher's k likeliest, a mean over the
            tokens of the student's first completion of each prompt.
        k: of `likeliest`.
        prompts: number of prompts.
        n: completions of each.
    """

    rows: tuple[ProbeRow, ...]
    overlap: float
    likeliest: float
    k: int
    prompts: int
    n: int

    def row(self, name: str) -> ProbeRow:
        """Return the row of one way of sampling, a key of `MIXTURES`."""
        return next(row for row in self.rows if row.name == name)


def probe(
    sampler: OptimalSamplingV1,
    dataset: Iterable[Mapping[str, Any]],
    reward: Reward,
    *,
    n: int = 8,
    max_tokens: int = 256,
    temperature: float = 1.0,
    accept: float | None = None,
    seed: int = 0,
) -> Probe:
    """Sample prompts at each of `MIXTURES`, and measure what comes out.

    Args:
        sampler: the pair, ready to sample; its own mixture is not read.
        dataset: rows with a `prompt`, and a `teacher_prompt` where the teacher reads another, as a trainer takes them;
            64 are a good number.
        reward: called with all completions of one way of sampling at once, and the columns of their rows.
        n: completions of each prompt.
        max_tokens: longest completion.
        temperature: above 0.
        accept: smallest reward that counts as a success, rounding aside; None is any above 0.
        seed: of the sampling; the r-th completion of a call uses `seed + r`.

    Returns:
        the measurements, in the order of `MIXTURES`.

    Raises:
        ValueError: on rows without a prompt, settings out of range, or another number of rewards than completions.

    Example:
        ```python
        with OptimalSamplingV1("large", "small") as sampler:
            print(probe_text(probe(sampler, dataset.select(range(64)), reward)))
        ```
    """
    n = check_whole("probe", "n", n, 1)
    beside = "Pass one; the likeliest tokens are tried beside it."
    check_number("probe", "temperature", temperature, above=0.0, advice=beside)
    from .pairing.rows import check_not_keyed

    check_not_keyed("probe: `dataset`", dataset, "rows as a trainer takes them")
    rows = [dict(row) for row in dataset]
    if not rows or not all("prompt" in row for row in rows):
        raise ValueError(
            "probe: `dataset` has no rows, or rows without a `prompt`; wanted rows as a trainer takes them."
        )
    task = _Task(sampler, rows, reward, max_tokens, accept)
    # A token of each prompt first: else the first row would pay alone for kernels to compile and prompts to cache.
    replace(task, max_tokens=1).sample(Mixture(), 1, temperature, seed)
    measured, overlap = [], math.nan
    for name, mixture in MIXTURES.items():
        start = time.perf_counter()
        rollouts = task.sample(mixture, n, temperature, seed)
        seconds = time.perf_counter() - start
        greedy = float(task.accepted(task.sample(mixture, 1, 0.0, None)).mean()) if name in GREEDY else math.nan
        measured.append(_measure(name, rollouts, task.accepted(rollouts).view(-1, n), greedy, seconds))
        if name == "student":
            overlap = _overlap(rollouts)
    # The same tokens as the student's first completions, apart from them: records of whole rows take time.
    k = min(LIKELIEST, sampler.backend.pair.vocabulary)
    likeliest = _likeliest(task.sample(MIXTURES["student"], 1, temperature, seed, Dense(top_k=k)))
    return Probe(tuple(measured), overlap, likeliest, k, len(rows), n)


@dataclass(frozen=True)
class _Task:
    """The prompts, and who samples and judges their completions."""

    sampler: OptimalSamplingV1
    rows: list[dict[str, Any]]
    reward: Reward
    max_tokens: int
    accept: float | None

    def sample(
        self, mixture: Mixture, n: int, temperature: float, seed: int | None, dense: Dense | None = None
    ) -> list[Rollout]:
        """Return n completions of each prompt, those of one prompt next to each other."""
        from .pairing.prompts import TEACHER_PROMPT

        prompts = [row["prompt"] for row in self.rows]
        instead = [row.get(TEACHER_PROMPT) for row in self.rows]
        settings: dict[str, Any] = {"temperature": temperature, "n": n, "seed": seed, "teacher_prompts": instead}
        return self.sampler.generate(prompts, self.max_tokens, mixture=mixture, dense=dense, **settings).rollouts

    def accepted(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " N"]:
        """Return 1 where the reward accepts a completion, else 0; 0 too where it could not score one."""
        from .pairing.prompts import is_chat

        n = len(rollouts) // len(self.rows)
        rows = [row for row in self.rows for _ in range(n)]
        texts = [
            [{"role": "assistant", "content": one.text}] if is_chat(row["prompt"]) else one.text
            for one, row in zip(rollouts, rows)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        given = self.reward(
            prompts=[row["prompt"] for row in rows],
            completions=texts,
            completion_ids=[one.completion_ids for one in rollouts],
            **columns,
        )
        if len(given) != len(rollouts):
            raise ValueError(
                f"probe: the reward {shown(self.reward)} returned {len(given)} numbers for {len(rollouts)} "
                "completions; wanted one for each. Return a list as long as `completions`."
            )
        rewards = torch.tensor([math.nan if one is None else float(one) for one in given])
        return accept_rewards(rewards, self.accept).float()


def _measure(
    name: str, rollouts: Sequence[Rollout], accepted: Float[Tensor, "P n"], greedy: float, seconds: float
) -> ProbeRow:
    """Summarise one way of sampling."""
    alpha, log_q, log_theta, log_teacher = (
        torch.cat([getattr(one, record) for one in rollouts])
        for record in ("alpha", "log_q", "log_theta", "log_teacher")
    )
    found = metrics.of_mixture(alpha, log_q, log_theta, log_teacher) | metrics.of_drafts(log_q, log_theta)
    share = accepted.mean(1)
    return ProbeRow(
        name,
        found.get(metrics.ALPHA_MEAN, math.nan),
        float(accepted.mean()),
        float((share > 0).float().mean()),
        float(((share > 0) & (share < 1)).float().mean()),
        greedy,
        found.get(metrics.KL_THETA, math.nan),
        found.get(metrics.KL_TEACHER, math.nan),
        found.get(metrics.ACCEPTANCE, math.nan),
        seconds / max(len(alpha), 1),
    )


def _overlap(rollouts: Sequence[Rollout]) -> float:
    """Return E_θ[min(1, t/θ)] = Σ min(θ, t) over the student's tokens."""
    ratio = torch.cat([one.log_teacher - one.log_theta for one in rollouts])
    return float(ratio.clamp(max=0.0).exp().mean())


def _likeliest(rollouts: Sequence[Rollout]) -> float:
    """Return the share of the student's likeliest tokens that are among the teacher's, a mean over all tokens."""
    records = [one.dense for one in rollouts if one.dense is not None]
    repeated = torch.cat([~one.is_first[:, one.ids.shape[1] // 2 :] for one in records])  # (T, k), the teacher's
    return float(repeated.double().mean())


COLUMNS = {
    "sampled from": lambda row: row.name,
    "α": lambda row: _number(row.alpha),
    "success": lambda row: _share(row.success),
    "pass@{n}": lambda row: _share(row.any_success),
    "signal": lambda row: _share(row.signal),
    "greedy": lambda row: _share(row.greedy),
    "KL(q‖θ)": lambda row: _number(row.kl_theta),
    "KL(q‖t)": lambda row: _number(row.kl_teacher),
    "min(1, θ/q)": lambda row: _number(row.acceptance),
    "µs a token": lambda row: f"{1e6 * row.seconds:.0f}",
}
"""The columns of the page, and what stands in each."""


STYLE = (
    "body{font:16px system-ui;max-width:70em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.3em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "tr{border-bottom:1px solid #8884}table{border-collapse:collapse}"
)


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"  # a divergence of -1e-9 is 0.000


def _cells(found: Probe) -> list[list[str]]:
    """Return the page's table, the head first."""
    head = [name.format(n=found.n) for name in COLUMNS]
    return [head, *([cell(row) for cell in COLUMNS.values()] for row in found.rows)]


def _lines(found: Probe) -> tuple[str, str]:
    """Return what stands above and below the table."""
    above = (
        f"{found.prompts} prompts, {found.n} completions each. Mass in common, Σ min(θ, t): {found.overlap:.3f}. "
        f"Of the student's {found.k} likeliest tokens {_share(found.likeliest)} are among the teacher's {found.k}."
    )
    below = (
        "success: share of completions that the reward accepts. signal: share of prompts with right and wrong ones. "
        "KL in nats a token. These are measurements and no advice: see docs/probe.md."
    )
    return above, below


def probe_text(found: Probe) -> str:
    """Return a probe as one page for a terminal."""
    cells, (above, below) = _cells(found), _lines(found)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(row))
        for row in (list(zip(one, widths, strict=True)) for one in cells)
    ]
    return "\n".join([above, "", *lines, "", below])


def probe_json(found: Probe) -> str:
    """Return a probe's fields as JSON; null stands where there was nothing to average."""
    return json.dumps(_with_null(asdict(found)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _with_null(value: Any) -> Any:
    """Return nested values with None in the place of NaN."""
    if isinstance(value, dict):
        return {name: _with_null(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def probe_page(found: Probe, title: str = "Probe") -> str:
    """Return a probe as one page of HTML without scripts. The title is escaped."""
    (head, *rows), (above, below) = _cells(found), _lines(found)

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(above)}</p>"
        f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"
        f"<p>{html.escape(below)}</p></html>\n"
    )
