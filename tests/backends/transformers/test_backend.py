"""The transformers backend on tiny live models: every record against the oracle, each way to end, live weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Mamba2Config,
    PreTrainedModel,
)

from helpers.models import EOS, FAMILIES, KEPT, PAD, make_model, make_spaced_pair, make_tokenizer, publish
from helpers.oracle import check_rollout, check_rollouts, expected_records, with_wishes
from helpers.strategies import RANGED
from optimal_sampling_trl.backends import make_backend
from optimal_sampling_trl.backends.transformers import TransformersBackend, decoding, dense
from optimal_sampling_trl.backends.transformers.decoding import Rows
from optimal_sampling_trl.mixture import METHODS, Mixture
from optimal_sampling_trl.mixture.dense import measure
from optimal_sampling_trl.pairing import Ending
from optimal_sampling_trl.pairing.names import model_class
from optimal_sampling_trl.pairing.wrappers import WRAPPERS, text_weights
from optimal_sampling_trl.rollouts.dense import Dense
from optimal_sampling_trl.rollouts.request import Request, Sampling
from optimal_sampling_trl.rollouts.rollout import RECORDS, Rollout

TEXTS = ("hello world", "x", "wrap a line, please, and another", "0 1 1 2 3", "Two prompts", "hello world")
MIXTURES = {
    "kl_symmetry": Mixture(),
    "ess_balance": Mixture("ess_balance"),
    "trust_region": Mixture("trust_region", epsilon=0.02),
    "entropy": Mixture("entropy"),
    "fixed": Mixture("fixed", fixed_alpha=0.7),
    "entropy_gate": Mixture("entropy_gate", entropy_scale=8.0),
    "top_k_swap": Mixture("top_k_swap", swap_top_k=90),
    "clamped": Mixture(alpha_min=0.7, alpha_max=0.9),
    "theta": Mixture.theta_only(),
    "teacher": Mixture.teacher_only(),
}
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "tied": True}
LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention"]
MAMBA = {"mamba_d_state": 16, "mamba_chunk_size": 16, "layer_types": LINEAR_FIRST[:2]}
EXPERTS = {"initializer_range": 0.05, "layers": 3, "layer_types": ["linear_attention", "moe", "full_attention"]}
SHARED = WINDOW | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    **{"layers": 3, "num_kv_shared_layers": 1},
}
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", {"vocab_size": 320, "heads": 4, "kv_heads": 2}, {"tied": True}),
    "llama": ("llama", {"layers": 3}, {"vocab_size": 320}),
    "qwen3": ("qwen3", {}, {"vocab_size": 272}),
    "mistral": ("mistral", {}, {}),
    "mistral-window": ("mistral", {"sliding_window": 7}, {"sliding_window": 9}),
    "granite": ("granite", {}, {"layers": 1}),
    "qwen3_next": ("qwen3_next", {}, {}),
    "qwen3_5": ("qwen3_5_text", {"layers": 3, "layer_types": LINEAR_FIRST}, {"tied": True}),
    "granite4-h": ("granitemoehybrid", MAMBA, MAMBA),
    "lfm2": ("lfm2", {"tied": True}, {"tied": True}),
    "nemotron_h": ("nemotron_h", EXPERTS, EXPERTS),
    "gemma2": ("gemma2", WINDOW, WINDOW),
    "gemma3": ("gemma3_text", WINDOW, WINDOW),
    "gemma3-wrapper": ("gemma3", WINDOW, WINDOW),
    "qwen3_vl-wrapper": ("qwen3_vl", {}, {"tied": True}),
    "qwen3_5-wrapper": ("qwen3_5", {}, {"tied": True}),
    "qwen3_5_moe-wrapper": ("qwen3_5_moe", {}, {}),
    "ministral3-wrapper": ("mistral3", {}, {"tied": True}),
    "gemma4-wrapper": ("gemma4", SHARED, SHARED),
    "deepseek_v2": ("deepseek_v2", {}, {}),
    "moonlight": ("deepseek_v3", {}, {}),
    "glm4_moe_lite": ("glm4_moe_lite", {}, {}),
}
"""Family, and what the teacher's and the student's configuration have of their own. The first is every test's pair."""
TOKENIZER = make_tokenizer()
TOLERANCE = 2e-5
"""In nats and in α; measured: 3e-6 and 2e-7, float32's rounding of another order of sums."""
FALSE_ALARM = 1e-6
"""Of all chi-square tests of this file together."""


class Pair:
    """A pair in folders, the backend on it, and its models for the oracle, loaded apart from the backend's.

    Args:
        teacher: the teacher's folder.
        theta: the student's folder.
    """

    def __init__(self, teacher: str, theta: str) -> None:
        self.folders = teacher, theta
        self.backend = TransformersBackend(teacher, theta, device="cpu")
        self.models = load(teacher), load(theta)

    def check(self, rollouts: list[Rollout], requests: list[Request], ending: Ending | None = None) -> None:
        check_rollouts(rollouts, requests, *self.models, ending=ending, tolerance=TOLERANCE)


def load(folder: str) -> PreTrainedModel:
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def ask(text: str = TEXTS[0], mixture: Mixture | None = None, theta: str | None = None, **sampling: Any) -> Request:
    """A request for both models; `theta` is the student's prompt, where it has its own."""
    settings = {"max_tokens": 8, "seed": 0} | sampling
    return Request(ids(text), ids(text if theta is None else theta), mixture or Mixture(), Sampling(**settings))


def every_mixture(**sampling: Any) -> list[Request]:
    """A request for each of `MIXTURES`, ragged prompts, two of them equal; a seed of its own for each."""
    return [
        ask(TEXTS[i % len(TEXTS)], mixture, **{"seed": i} | sampling) for i, mixture in enumerate(MIXTURES.values())
    ]


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(name: str) -> Pair:
        family, teacher, theta = PAIRS[name]
        root = tmp_path_factory.mktemp(name)
        return Pair(make_model(root / "teacher", family, 0, **teacher), make_model(root / "theta", family, 1, **theta))

    return make


@pytest.fixture(scope="module")
def pair(make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair("qwen2")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each forward pass of a model, as they happen."""
    seen: list[int] = []
    forward = decoding.Reader._forward

    def spy(self: decoding.Reader, tokens: Tensor, positions: Tensor) -> None:
        seen.append(len(tokens))
        forward(self, tokens, positions)

    monkeypatch.setattr(decoding.Reader, "_forward", spy)
    return seen


ARITHMETIC = (
    Mixture(form="arithmetic"),
    Mixture("trust_region", form="arithmetic"),
    Mixture("entropy", form="arithmetic"),
    Mixture("fixed", fixed_alpha=0.2, form="arithmetic"),
    Mixture(alpha_min=0.3, alpha_max=0.3, form="arithmetic"),
    Mixture("fixed", alpha_min=1.0, fixed_alpha=1.0, form="arithmetic"),
)
SWAPS = tuple(Mixture("top_k_swap", swap_top_k=K) for K in (1, 25, 200, 1000))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.4}, {"temperature": 0}, {"top_k": 20, "temperature": 1.5}, {"repetition_penalty": 1.4}],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_the_arithmetic_form_beside_the_geometric(pair: Pair, settings: dict[str, Any]) -> None:
    mixtures = [mixture for one in ARITHMETIC for mixture in (one, replace(one, form="geometric"))]
    requests = [ask(TEXTS[i % 6], mixture, **{"seed": i // 2} | settings) for i, mixture in enumerate(mixtures)]
    requests = with_wishes(requests)
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert rollouts[-1].completion_ids == pair.backend.generate(requests[-1:])[0].completion_ids


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.4}, {"temperature": 0}, {"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.4}],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_swapped_tokens_beside_others(pair: Pair, settings: dict[str, Any]) -> None:
    requests = [ask(TEXTS[i % 6], one, **{"seed": i} | settings) for i, one in enumerate((*SWAPS, Mixture(), *SWAPS))]
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert 0.1 < float(rollouts[1].alpha.mean()) < 1  # the student's own would be 0
    assert bool((rollouts[3].alpha == 0).all())  # more than the vocabulary: the teacher has every token
    assert rollouts[3].completion_ids[0] in range(288)


@pytest.mark.parametrize("name", PAIRS)
def test_the_records_of_every_family_and_method(make_pair: Callable[[str], Pair], name: str) -> None:
    pair = make_pair(name)
    assert {mixture.method for mixture in MIXTURES.values()} == set(METHODS)
    assert {family for family, _, _ in PAIRS.values()} <= set(FAMILIES)
    requests = with_wishes(every_mixture(max_tokens=12) + [ask(TEXTS[2], seed=100 + i) for i in range(4)])
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert len({tuple(rollout.completion_ids) for rollout in rollouts[-4:]}) == 4
    for rollout in rollouts:
        if rollout.mixture.alpha_min == rollout.mixture.alpha_max:
            assert bool((rollout.alpha == rollout.mixture.alpha_min).all())


def test_the_oracle_tells_a_wrong_record(pair: Pair) -> None:
    """The oracle fails on a record that is 1e-3 off, and on the record of another mixture, temperature or prompt."""
    request = ask("abc", seed=5)
    (rollout,) = pair.backend.generate([request])
    check_rollout(rollout, *pair.models)
    fields = vars(rollout)
    wrong = [{name: fields[name] + 1e-3} for name in RECORDS]
    wrong += [{"mixture": Mixture("entropy")}, {"temperature": 0.9}, {"prompt_ids": ids("abd")}]
    wrong += [{"theta_prompt_ids": ids("bc")}, {"alpha": fields["alpha"] * torch.nan}]
    for change in wrong:
        with pytest.raises(AssertionError, match=r"of token \d+ \(id .* the oracle says"):
            check_rollout(Rollout(**{**fields, **change}), *pair.models)


def test_two_prompts(make_pair: Callable[[str], Pair]) -> None:
    """The student reads a system prompt of its own: longer, shorter, or the same as another row's."""
    pair = make_pair("llama")
    texts = [("You are wise.\n\nadd", "add"), ("add", "You are a student.\n\nadd"), ("add", "add"), ("a", "add")]
    requests = [
        ask(teacher, mixture, theta, seed=i)
        for i, (teacher, theta) in enumerate(texts)
        for mixture in (Mixture(), Mixture.theta_only(), Mixture("trust_region"))
    ]
    requests = with_wishes(requests)
    pair.check(pair.backend.generate(requests), requests)


HYBRIDS = ["qwen3_next", "qwen3_5_text"]


@pytest.mark.parametrize("families", [("qwen3_5", "qwen3"), ("qwen3", "qwen3_5_text"), ("qwen3_5_text", "qwen3_next")])
def test_a_hybrid_beside_another_model(tmp_path: Path, families: tuple[str, str]) -> None:
    """Two prompts of unequal length, each three times, beside rows that end early and leave the batch."""
    pair = Pair(*(make_model(tmp_path / str(seed), family, seed) for seed, family in enumerate(families)))
    texts = [("You are wise, and answer in one word.\n\nadd", "add"), ("add", "You are a student.\n\nadd"), ("a", "a")]
    requests = [ask(teacher, None, theta, seed=None, max_tokens=12) for teacher, theta in texts for _ in range(3)]
    requests += [ask(text, seed=None, max_tokens=2) for text in TEXTS * 2]
    requests = with_wishes(requests)
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert len({tuple(rollout.completion_ids) for rollout in rollouts[:3]}) == 3


@pytest.mark.parametrize("family", HYBRIDS)
def test_padding_reaches_no_state(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt beside a long one ends in the states, and goes on with the logits, that it has alone.

    The long one spans two chunks of the linear attention's, the short one is shorter than its convolution.
    """
    model, device = load(make_model(tmp_path / "model", family, 0)), torch.device("cpu")

    def read(*prompts: list[int]) -> list[Tensor]:
        with torch.no_grad():
            reader = decoding.Reader(model, list(prompts), 512, device)
            logits = [reader.logits[-1]]
            for token in (5, 6, 7):
                reader.step(torch.full((len(prompts),), token))
                logits.append(reader.logits[-1])
        layer = reader.cache.layers[0]
        return [*logits, layer.conv_states[0][-1], layer.recurrent_states[0][-1]]

    short, long = ids("ab"), ids("A prompt that is longer, by far, than the other. " * 2)
    torch.testing.assert_close(read(long, short), read(short), rtol=0, atol=TOLERANCE)
    room = f"transformers.models.{model.__module__.split('.')[2]}.{model.__module__.split('.')[3]}"
    monkeypatch.setattr(f"{room}.apply_mask_to_padding_states", lambda states, mask: states)
    with pytest.raises(AssertionError):  # what a leak would look like
        torch.testing.assert_close(read(long, short), read(short), rtol=0, atol=100 * TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 20, "temperature": 0.8},
        {"top_k": 1},
        {"top_k": 100_000},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 1.2},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 2},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 0.8, "temperature": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "top_k": 1, "top_p": 0.5, "min_p": 0.3},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_temperature_truncation_and_penalty(pair: Pair, settings: dict[str, Any]) -> None:
    requests = with_wishes(every_mixture(**settings))
    pair.check(pair.backend.generate(requests), requests)


def test_settings_of_a_row_are_its_own(pair: Pair) -> None:
    """One batch in which every row is sampled in another way gives what each row gives by itself."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5, "repetition_penalty": 1.5},
        {},
        {"min_p": 0.2},
        {"temperature": 0},
        {"repetition_penalty": 0.7, "max_tokens": 3},
        {"repetition_penalty": 1.5, "top_p": 0.5, "max_tokens": 11},
        {"top_k": 5, "temperature": 1.3},
        {"top_p": 0.8, "temperature": 0.7},
    ]
    requests = [
        ask(TEXTS[i % 6], mixture, seed=i, **setting)
        for i, (setting, mixture) in enumerate(zip(settings, MIXTURES.values(), strict=True))
    ]
    requests = with_wishes(requests)
    together = pair.backend.generate(requests)
    pair.check(together, requests)
    alone = [pair.backend.generate([request])[0] for request in requests]
    assert [rollout.completion_ids for rollout in together] == [rollout.completion_ids for rollout in alone]


def test_dense_records_of_the_whole_vocabulary(pair: Pair) -> None:
    V = pair.backend.pair.vocabulary
    request = replace(ask(), dense=Dense(top_k=V))
    (rollout,) = pair.backend.generate([request])
    pair.check([rollout], [request])
    assert rollout.dense is not None
    assert rollout.dense.is_first.sum(1).tolist() == [V] * len(rollout.completion_ids)
    assert float(rollout.dense.tail_teacher.max()) < 1e-5
    with pytest.raises(ValueError, match=f"`top_k` is {V + 1}; wanted a whole number from 0 to {V}"):
        pair.backend.generate([replace(ask(), dense=Dense(top_k=V + 1))])


def test_a_request_without_a_wish_is_not_measured(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four requests one has a wish: its rows alone are measured, and the same tokens are drawn as without it."""
    measured: list[int] = []

    def spy(*arguments: Any) -> Any:
        measured.append(len(arguments[6]))  # the rows
        return measure(*arguments)

    monkeypatch.setattr(dense, "measure", spy)
    requests = [ask(TEXTS[i], seed=i, ignore_eos=True) for i in range(4)]
    without = pair.backend.generate(requests)
    assert measured == []
    requests[2] = replace(requests[2], dense=Dense(("overlap",), 1))
    together = pair.backend.generate(requests)
    assert measured == [1] * 8
    assert [one.completion_ids for one in together] == [one.completion_ids for one in without]


def test_greedy(pair: Pair) -> None:
    """At temperature 0 the oracle checks that each token is the likeliest; there is nothing to weight."""
    requests = every_mixture(temperature=0.0, seed=None, max_tokens=10)
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    with pytest.raises(ValueError, match="no importance weights"):
        _ = rollouts[0].weight_theta


def test_padding_is_never_drawn(pair: Pair) -> None:
    """The teacher scores 320 tokens and the student 288: neither alone draws an id that the other lacks."""
    requests = [ask(TEXTS[1], Mixture.teacher_only(), seed=i, temperature=3.0, ignore_eos=True) for i in range(60)]
    drawn = {token for rollout in pair.backend.generate(requests) for token in rollout.completion_ids}
    assert 258 <= max(drawn) < 288
    with pytest.raises(ValueError, match="prompt 0 holds token 288; wanted ids from 0 to 287"):
        pair.backend.generate([Request([288], [288])])


@pytest.mark.parametrize("role", ["teacher", "theta"])
def test_experts_whose_scores_a_configuration_asks_for(tmp_path: Path, role: str) -> None:
    folders = [
        make_model(tmp_path / name, "qwen3_moe", seed, **({"output_router_logits": True} if name == role else {}))
        for seed, name in enumerate(("teacher", "theta"))
    ]
    pair = Pair(*folders)
    requests = [ask(text, max_tokens=6) for text in TEXTS]
    pair.check(pair.backend.generate(requests), requests)


def test_an_end_of_sequence_token_ends(pair: Pair) -> None:
    settings = {"max_tokens": 40, "temperature": 2.0}
    requests = [ask(TEXTS[i % 6], seed=i, **settings) for i in range(30)]
    rollouts = pair.backend.generate(requests)
    stopped = [index for index, rollout in enumerate(rollouts) if rollout.finish_reason == "stop"]
    assert 0 < len(stopped) < 30
    pair.check([rollouts[index] for index in stopped], [requests[index] for index in stopped])
    for rollout in rollouts:
        assert EOS not in rollout.completion_ids[:-1]
        assert (rollout.completion_ids[-1] == EOS) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 40
        assert rollout.text == pair.backend.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
        assert "<eos>" not in rollout.text
    longer = pair.backend.generate([ask(TEXTS[i % 6], seed=i, ignore_eos=True, **settings) for i in range(30)])
    assert {(len(rollout.completion_ids), rollout.finish_reason) for rollout in longer} == {(40, "length")}
    for short, long in zip(rollouts, longer):
        assert long.completion_ids[: len(short.completion_ids)] == short.completion_ids


def test_an_end_of_sequence_token_that_comes_last(pair: Pair) -> None:
    """One that fills max_tokens is a stop all the same."""
    seeds = range(2_000)
    rollouts = pair.backend.generate([ask(seed=seed, max_tokens=1, temperature=2.0) for seed in seeds])
    ended = {rollout.finish_reason for rollout in rollouts if rollout.completion_ids == [EOS]}
    assert ended == {"stop"}
    assert {rollout.finish_reason for rollout in rollouts if rollout.completion_ids != [EOS]} == {"length"}


def test_the_teachers_own_ending_is_folded(tmp_path: Any) -> None:
    """The teacher ends with `<pad>` and the student with `<eos>`: what the teacher gives to its own counts for θ's."""
    pair = Pair(make_model(tmp_path / "t", "qwen2", 0, eos_token_id=PAD), make_model(tmp_path / "s", "qwen2", 1))
    ending = Ending((EOS,), (PAD,))
    assert pair.backend.pair.ending == ending
    requests = [
        ask(TEXTS[i % 6], mixture, seed=8 * i + j, max_tokens=30, temperature=1.5)
        for i in range(8)
        for j, mixture in enumerate((Mixture(), Mixture.teacher_only(), Mixture("entropy")))
    ]
    requests = with_wishes(requests)
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests, ending)
    assert PAD not in {token for rollout in rollouts for token in rollout.completion_ids}
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    with pytest.raises(AssertionError, match="the oracle says"):
        pair.check(rollouts, requests)


def test_where_a_completion_ends(pair: Pair) -> None:
    """At max_tokens, or where the longer of the two prompts and the completion fill the context of 512."""
    requests = [
        ask("a", max_tokens=5, ignore_eos=True),
        ask("a" * 505, max_tokens=100, ignore_eos=True),
        ask("a", theta="b" * 508, max_tokens=100, ignore_eos=True),
        ask("a" * 511, max_tokens=2, ignore_eos=True),
    ]
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert [len(rollout.completion_ids) for rollout in rollouts] == [5, 7, 4, 1]
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


def test_a_shorter_context(pair: Pair) -> None:
    backend = TransformersBackend(*pair.folders, device="cpu", max_model_len=20)
    (rollout,) = backend.generate([ask("a" * 15, max_tokens=50, ignore_eos=True)])
    assert len(rollout.completion_ids) == 5
    with pytest.raises(ValueError, match="prompt 0 has 20 tokens, but the context holds 20"):
        backend.generate([ask("a" * 20)])


@pytest.mark.parametrize("stops", [1, 2])
def test_stop_texts(pair: Pair, stops: int) -> None:
    """A stop of two bytes, which no single token holds: the text is cut before it, the tokens are kept."""
    long = {"max_tokens": 40, "ignore_eos": True, "top_k": 40}
    (free,) = pair.backend.generate([ask(**long)])
    stop = next(free.text[i : i + 2] for i in range(6, 30) if free.text[i : i + 2].isascii())
    requests = [ask(stop=(stop, "never there")[:stops], **long), ask(**long)]
    cut, same = pair.backend.generate(requests)
    pair.check([cut, same], requests)
    assert same.text == free.text
    assert (cut.finish_reason, same.finish_reason) == ("stop", "length")
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.completion_ids == free.completion_ids[: len(cut.completion_ids)]
    assert pair.backend.tokenizer.decode(cut.completion_ids, skip_special_tokens=True) == cut.text + stop


def test_stop_texts_where_tokens_carry_spaces(tmp_path: Path) -> None:
    """A stop text may begin with a space, which a tokenizer like Llama-2's drops where a text begins."""
    backend = TransformersBackend(*make_spaced_pair(tmp_path), device="cpu")
    long = {"max_tokens": 30, "ignore_eos": True}
    (free,) = backend.generate([ask(**long)])
    place = free.text.index(" ", 4)
    stops = ("never there",), (free.text[place : place + 2],)
    whole, cut = backend.generate([ask(stop=stop, **long) for stop in stops])
    assert (whole.text, whole.finish_reason) == (free.text, "length")
    assert (cut.text, cut.finish_reason) == (free.text[: free.text.index(stops[1][0])], "stop")


def test_a_stop_text_around_tokens_that_are_special_to_the_text_alone(pair: Pair) -> None:
    """A token may be left out of texts without being among the tokenizer's special ones."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|sp|>", special=True, normalized=False)], special_tokens=False)
    (added,) = tokenizer("<|sp|>").input_ids
    assert added not in tokenizer.all_special_ids
    request = ask(stop=("ab",), max_tokens=64, ignore_eos=True)
    rows = Rows([request], replace(pair.backend.pair, tokenizer=tokenizer), pair.backend.device)
    drawn = [*ids("a"), *[added] * 9, *ids("b")]
    assert [rows._ended(0, token) for token in drawn] == [False] * 10 + [True]


def test_rows_that_ended_leave_the_batch(pair: Pair, batches: list[int]) -> None:
    requests = [
        ask(TEXTS[i % 6], mixture, seed=i, max_tokens=length, ignore_eos=True)
        for i, (length, mixture) in enumerate(zip((1, 9, 3, 14, 2, 6, 3, 1, 5, 4), MIXTURES.values(), strict=True))
    ]
    requests = with_wishes(requests)
    together = pair.backend.generate(requests)
    rows = batches[2::2]
    assert batches[0] == len({tuple(request.prompt_ids) for request in requests}) == 5  # equal prompts are read once
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (10, 1)
    assert len(rows) == 13
    pair.check(together, requests)
    for request, rollout in zip(requests, together):
        assert len(rollout.completion_ids) == request.sampling.max_tokens
        assert pair.backend.generate([request])[0].completion_ids == rollout.completion_ids


def test_more_requests_than_rows(pair: Pair, batches: list[int]) -> None:
    small = TransformersBackend(*pair.folders, device="cpu", max_num_seqs=3)
    requests = every_mixture()
    rollouts = small.generate(requests)
    assert max(batches) == 3
    pair.check(rollouts, requests)
    wanted = [rollout.completion_ids for rollout in pair.backend.generate(requests)]
    assert [rollout.completion_ids for rollout in rollouts] == wanted
    assert pair.backend.generate([]) == []


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(pair: Pair) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    requests = every_mixture(max_tokens=12)
    together = pair.backend.generate(requests)
    assert torch.equal(torch.get_rng_state(), before)  # seeded rows leave the trainer's generator alone
    for request, rollout in zip(requests, together):
        (alone,) = pair.backend.generate([request])
        assert alone.completion_ids == rollout.completion_ids
        for name in RECORDS:
            assert torch.allclose(getattr(alone, name), getattr(rollout, name), atol=1e-5)
    mixed = pair.backend.generate([ask(seed=None), *requests, ask(seed=None)])
    assert [rollout.completion_ids for rollout in mixed[1:-1]] == [rollout.completion_ids for rollout in together]
    assert mixed[0].completion_ids != mixed[-1].completion_ids
    other = pair.backend.generate([ask(seed=seed) for seed in range(6)])
    assert len({tuple(rollout.completion_ids) for rollout in other}) == 6


def test_without_a_seed_torchs_generator_draws(pair: Pair) -> None:
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append([rollout.completion_ids for rollout in pair.backend.generate([ask(seed=None)] * 3)])
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(completion) for completion in runs[0]}) == 3


# The student as a live module.


@pytest.fixture
def live(tmp_path: Any) -> PreTrainedModel:
    """A student in training mode with dropout that would be seen, one layer of it in evaluation mode."""
    folder = make_model(tmp_path / "live", "qwen2", 1, attention_dropout=0.5)
    theta = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    theta.model.layers[1].eval()
    return theta


def test_a_live_student_stays_as_it_was(pair: Pair, live: PreTrainedModel) -> None:
    backend = TransformersBackend(pair.folders[0], live)
    assert backend.theta is live
    modes = {name: module.training for name, module in live.named_modules()}
    assert set(modes.values()) == {True, False}
    requests = every_mixture()
    rollouts = backend.generate(requests)
    check_rollouts(rollouts, requests, pair.models[0], live)  # the oracle's copy has no dropout
    assert {name: module.training for name, module in live.named_modules()} == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in live.parameters())
    assert not any(getattr(rollout, name).requires_grad for rollout in rollouts for name in RECORDS)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        live.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the student returned NaN"):
        backend.generate(requests)
    assert {name: module.training for name, module in live.named_modules()} == modes


def test_an_optimizer_step_is_seen_at_once(pair: Pair, live: PreTrainedModel) -> None:
    backend = TransformersBackend(pair.folders[0], live)
    requests = every_mixture()
    before = backend.generate(requests)
    loss = live(torch.tensor([ids("a step")]), labels=torch.tensor([ids("a step")])).loss
    loss.backward()
    torch.optim.SGD(live.parameters(), lr=0.5).step()
    after = backend.generate(requests)
    check_rollouts(after, requests, pair.models[0], live)
    assert any(not torch.equal(old.log_theta, new.log_theta) for old, new in zip(before, after))


def test_one_model_as_both(live: PreTrainedModel) -> None:
    """θ = t: q is both, whatever α is, and the middle of the range is taken."""
    requests = [ask(mixture=Mixture(alpha_min=0.2, alpha_max=0.8)), ask(mixture=Mixture("trust_region"))]
    middle, region = TransformersBackend(live, live).generate(requests)
    assert torch.allclose(middle.alpha, torch.full_like(middle.alpha, 0.5))
    for rollout in (middle, region):
        assert torch.allclose(rollout.log_q, rollout.log_theta, atol=1e-5)
        assert torch.equal(rollout.log_theta, rollout.log_teacher)


# Weights.


@pytest.mark.parametrize("tied", [False, True])
def test_load_theta(tmp_path: Any, pair: Pair, tied: bool) -> None:
    new = load(make_model(tmp_path / "new", "qwen2", 9, tied=tied))
    backend = TransformersBackend(pair.folders[0], make_model(tmp_path / "old", "qwen2", 1, tied=tied), device="cpu")
    place = backend.theta.model.embed_tokens.weight.data_ptr()
    requests = every_mixture(max_tokens=4)
    backend.load_theta(new.named_parameters())
    check_rollouts(backend.generate(requests), requests, pair.models[0], new)
    assert backend.theta.model.embed_tokens.weight.data_ptr() == place
    with torch.no_grad():
        new.model.embed_tokens.weight.mul_(2)
    assert not torch.equal(backend.theta.model.embed_tokens.weight, new.model.embed_tokens.weight)


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_is_loaded_under_each_of_its_names(tmp_path: Path, pair: Pair, family: str) -> None:
    """TRL pushes a wrapper's weights, towers and all; another trainer those of the language model alone."""
    folder = make_model(tmp_path / "old", family, 1)
    new = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    weights = dict(new.named_parameters())
    requests = [ask(text, max_tokens=4) for text in TEXTS]
    for named in (weights, dict(text_weights(weights.items()))):
        backend = TransformersBackend(pair.folders[0], folder, device="cpu")
        backend.load_theta(named)
        check_rollouts(backend.generate(requests), requests, pair.models[0], new)
        named.pop(next(name for name in named if name.endswith("model.norm.weight")))
        with pytest.raises(ValueError, match=r"do not fit the student \(1 differ\): .* is missing"):
            backend.load_theta(named.items())


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text", "gemma4"])
def test_a_state_dict_brings_its_buffers(tmp_path: Path, family: str) -> None:
    """Biases of experts and scales of layers, which are no parameters; without them the old ones stay."""
    folders = [make_model(tmp_path / str(seed), family, seed) for seed in range(2)]
    new = model_class(AutoConfig.from_pretrained(folders[1])).from_pretrained(folders[1])
    backend = TransformersBackend(*folders[:1] * 2, device="cpu")
    old = {name: value.clone() for name, value in backend.theta.state_dict().items() if name.endswith(KEPT)}
    wanted = {name: value for name, value in new.state_dict().items() if name.endswith(KEPT)}
    assert any(not torch.equal(value, wanted[name]) for name, value in old.items())
    for named, kept in ((new.named_parameters(), old), (new.state_dict(), wanted)):
        backend.load_theta(named)
        assert all(torch.equal(backend.theta.state_dict()[name], value) for name, value in kept.items())
    requests = [ask(text, max_tokens=4) for text in TEXTS]
    teacher = model_class(new.config).from_pretrained(folders[0]).eval()
    check_rollouts(backend.generate(requests), requests, teacher, new.eval())
    name = next(iter(wanted))
    with pytest.raises(ValueError, match=rf"{name.split('.')[-1]} has shape \(3,\), wanted"):
        backend.load_theta(new.state_dict() | {name: torch.ones(3)})


@pytest.mark.parametrize(
    "names", [("model.embed_tokens.weight",), ("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")]
)
def test_a_tied_weight_comes_under_any_name(tmp_path: Any, pair: Pair, names: tuple[str, ...]) -> None:
    new = load(make_model(tmp_path / "new", "qwen2", 9, tied=True))
    shared = new.model.embed_tokens.weight
    weights = {name: p for name, p in new.named_parameters() if p is not shared}
    weights |= {name: shared.detach().clone() for name in names}
    backend = TransformersBackend(*pair.folders, device="cpu")
    requests = every_mixture(max_tokens=4)
    backend.load_theta(weights.items())
    check_rollouts(backend.generate(requests), requests, pair.models[0], new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, r"1 differ\): model.norm.weight is missing"),
        ({"model.norm.bias": torch.ones(64)}, r"1 differ\): model.norm.bias is unknown"),
        ({"model.norm.weight": torch.ones(65)}, r"model.norm.weight has shape \(65,\), wanted \(64,\)"),
        ({"lm_head.weight": torch.ones(288, 64)}, "embed_tokens.weight differ, but the student ties them"),
        ({"lm_head.weight": torch.ones(288, 65)}, r"lm_head.weight has shape \(288, 65\), wanted \(288, 64\)"),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
    ],
    ids=["missing", "unknown", "shape", "untied", "tied-shape", "tied-missing"],
)
def test_weights_are_loaded_whole_or_not_at_all(
    tmp_path: Any, pair: Pair, change: dict[str, Tensor | None], words: str
) -> None:
    backend = TransformersBackend(*pair.folders, device="cpu")
    before = {name: parameter.clone() for name, parameter in backend.theta.named_parameters()}
    weights = dict(load(make_model(tmp_path / "new", "qwen2", 9, tied=True)).named_parameters()) | change
    with pytest.raises(ValueError, match=rf"do not fit the student .*{words}.*Nothing was loaded"):
        backend.load_theta((name, weight) for name, weight in weights.items() if weight is not None)
    after = dict(backend.theta.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_a_live_student_has_nothing_to_load(pair: Pair, live: PreTrainedModel) -> None:
    before = live.lm_head.weight.clone()
    with pytest.raises(ValueError, match="the live module itself"):
        TransformersBackend(pair.folders[0], live).load_theta([("lm_head.weight", torch.zeros(288, 64))])
    assert torch.equal(live.lm_head.weight, before)


def test_sleep_wake_and_close(pair: Pair, live: PreTrainedModel) -> None:
    backend = TransformersBackend(pair.folders[0], live)
    requests = every_mixture(max_tokens=3)
    before = backend.generate(requests)
    backend.sleep()
    backend.wake_up()
    assert [rollout.completion_ids for rollout in backend.generate(requests)] == [r.completion_ids for r in before]
    backend.close()
    backend.close()
    assert not hasattr(backend, "teacher")
    for call in (lambda: backend.generate(requests), backend.sleep, backend.wake_up):
        with pytest.raises(RuntimeError, match=r"was closed\. Build another one"):
            call()
    with pytest.raises(RuntimeError, match="was closed"):
        TransformersBackend(pair.folders[0], live).close() or backend.generate([])


def test_models_on_another_device(pair: Pair) -> None:
    """What a backend that sleeps on a GPU's host looks like: the model is not where the tokens go."""
    backend = TransformersBackend(*pair.folders, device="cpu")
    backend.teacher.to("meta")
    with pytest.raises(RuntimeError, match=r"teacher is on meta; wanted cpu, .* Call `wake_up"):
        backend.generate([ask()])


def test_learned_positions(tmp_path: Any) -> None:
    """GPT-2 has a table of 24 positions, and a row that ended goes on until half of the batch has: not past it."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=288, n_positions=24, n_embd=64, n_layer=1, n_head=2, eos_token_id=EOS, bos_token_id=None,
            initializer_range=0.2,
        )  # fmt: skip
        folders.append(str(tmp_path / str(seed)))
        GPT2LMHeadModel(config).save_pretrained(folders[-1])
        make_tokenizer().save_pretrained(folders[-1])
    pair = Pair(folders[0], folders[1])
    requests = [ask("a" * length, seed=length, max_tokens=18, ignore_eos=True) for length in (23, 2, 3, 4)]
    rollouts = pair.backend.generate(requests)
    pair.check(rollouts, requests)
    assert [len(rollout.completion_ids) for rollout in rollouts] == [1, 18, 18, 18]


# NaN.


@pytest.mark.parametrize(
    ("broken", "blame", "alone"),
    [
        ((0,), "the teacher", "the teacher"),
        ((1,), "the student", "the student"),
        ((0, 1), "the student and the teacher", "the student"),
    ],
    ids=["teacher", "student", "both"],
)
def test_nan_names_the_requests(tmp_path: Any, broken: tuple[int, ...], blame: str, alone: str) -> None:
    """The embedding of one token is NaN: the two requests that read it are named, and no other.

    Where the student samples alone and returned NaN itself, the teacher may not have run: it is not named.
    """
    models = [load(make_model(tmp_path / str(i), "llama", i)) for i in range(2)]
    (token,) = ids("Q")
    with torch.no_grad():
        for index in broken:
            models[index].model.embed_tokens.weight[token] = torch.nan
    backend = TransformersBackend(models[0], models[1])
    fine = [ask("no such", seed=1, max_tokens=2), ask("letter", seed=2, max_tokens=2)]
    assert len(backend.generate(fine)) == 2
    requests = [fine[0], ask("Q", max_tokens=2), fine[1], ask("a Q", Mixture.theta_only(), max_tokens=2)]
    words = rf"in 2 request\(s\): request 1, token 0: {blame} returned NaN; request 3, token 0: {alone} returned NaN\."
    with pytest.raises(ValueError, match=words):
        backend.generate(requests)


# Whether tokens are drawn from q.


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square of counts (V,) against probabilities (V,); tokens expected less than 10 times are one."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 10
    pairs = torch.stack([counts.double(), expected])
    pairs = torch.cat([pairs[:, common], pairs[:, ~common].sum(1, keepdim=True)], dim=1)
    observed, expected = pairs[:, pairs[1] >= 10]
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.float64)
    value = float(torch.special.gammaincc(freedom / 2, statistic / 2))
    print(f"chi-square {float(statistic):.1f}, {int(freedom)} degrees of freedom, p = {value:.2g}")
    return value


def first_tokens(pair: Pair, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """How often each token came first (V,), in one batch of equal requests, and q (V,) after the oracle."""
    backend = TransformersBackend(*pair.folders, device="cpu", max_num_seqs=len(requests))
    rollouts = backend.generate(requests)
    _, log_q = expected_records(rollouts[0], *pair.models, sampling=requests[0].sampling)
    q = log_q[0].exp()
    drawn = torch.tensor([rollout.completion_ids[0] for rollout in rollouts])
    return torch.bincount(drawn, minlength=len(q)), q


COLD: dict[str, Any] = {"seed": None, "temperature": 0.5}
"""Where teacher and student differ so much that 0.1 of α is 28 standard deviations of the chi-square of 20 000."""
DRAWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: (name, 20_000, COLD) for name in (*METHODS, "theta", "teacher")},
    "warm": ("kl_symmetry", 20_000, {"seed": None}),
    "seeded": ("kl_symmetry", 6_000, {}),
    "cut": ("ess_balance", 20_000, {"seed": None, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3}),
}


@pytest.mark.parametrize("name", DRAWS)
def test_tokens_are_drawn_from_q(pair: Pair, name: str) -> None:
    """Pearson's chi-square of tens of thousands of first tokens against the oracle's q, with fixed seeds.

    A correct sampler fails one of these tests for one in 10⁶ sets of seeds: the threshold is `FALSE_ALARM` shared out
    among the tests (Bonferroni). What q gives no mass must not be drawn at all.
    """
    mixture, count, settings = DRAWS[name]
    torch.manual_seed(list(DRAWS).index(name))
    request = ask("chi", MIXTURES[mixture], "a prompt of its own", max_tokens=1, **settings)
    requests = [request] * count
    if name == "seeded":
        requests = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in range(count)]
    counts, q = first_tokens(pair, requests)
    assert int(counts.sum()) == count
    assert int(counts[q == 0].sum()) == 0
    assert p_value(counts, q) > FALSE_ALARM / len(DRAWS)


@pytest.mark.parametrize("method", RANGED)
def test_the_chi_square_sees_a_wrong_alpha(pair: Pair, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test on half the draws, with α 0.1 beside the solution, fails by far more than it may."""
    solve = decoding.solve_alpha

    def off(*arguments: Any) -> Tensor:
        alpha = solve(*arguments)
        return alpha + torch.where(alpha > 0.5, -0.1, 0.1)

    monkeypatch.setattr(decoding, "solve_alpha", off)
    torch.manual_seed(0)
    request = ask("chi", MIXTURES[method], "a prompt of its own", max_tokens=1, **COLD)
    assert p_value(*first_tokens(pair, [request] * 10_000)) < FALSE_ALARM**3


def test_the_chi_square_sees_another_set_of_likeliest_tokens(pair: Pair) -> None:
    """Half the draws of one K against q of the other K fail by far more than they may."""
    requests = [
        ask("chi", Mixture("top_k_swap", swap_top_k=K), "a prompt of its own", max_tokens=1, **COLD) for K in (90, 60)
    ]
    counts, _ = first_tokens(pair, requests[:1] * 10_000)
    _, q = first_tokens(pair, requests[1:])
    assert p_value(counts, q) < FALSE_ALARM**3


def test_the_weights_average_to_one(pair: Pair) -> None:
    """E_q[θ/q] = E_q[t/q] = 1: means of 10 000 first tokens within 5.5 standard errors. Luck fails one in 10⁷ sets of
    seeds. With top_k the student's weight averages to the mass that it has on the tokens kept."""
    torch.manual_seed(1)
    backend = TransformersBackend(*pair.folders, device="cpu", max_num_seqs=10_000)
    for settings in ({}, {"top_k": 30}):
        request = ask("mean", max_tokens=1, seed=None, **settings)
        rollouts = backend.generate([request] * 10_000)
        _, log_q = expected_records(rollouts[0], *pair.models, sampling=request.sampling)
        kept = log_q[0] > -torch.inf
        for name, model in (("weight_teacher", pair.models[0]), ("weight_theta", pair.models[1])):
            with torch.no_grad():
                mass = model(torch.tensor([request.prompt_ids])).logits[0, -1, :288].softmax(-1)[kept].sum()
            weights = torch.cat([getattr(rollout, name) for rollout in rollouts]).double()
            error = float(weights.mean()) - float(mass)
            assert abs(error) < 5.5 * float(weights.std()) / math.sqrt(len(weights))


# How the backend is asked for.


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_max_num_seqs(pair: Pair, value: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_num_seqs` is .*; wanted a whole number of at least 1\. Drop it"):
        TransformersBackend(*pair.folders, max_num_seqs=value)


@pytest.mark.parametrize(("value", "wanted"), [(1, "at least 2"), (513, "wanted 2 to 512"), (64.0, "a whole number")])
def test_max_model_len(pair: Pair, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"`max_model_len` is {value}; .*{wanted}"):
        TransformersBackend(*pair.folders, max_model_len=value)


def test_a_model_with_a_state_alone_is_refused(pair: Pair, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(Mamba2Config(
        vocab_size=288, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "mamba")
    TOKENIZER.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match=r"The student '.*' \(Mamba2ForCausalLM\) keeps a state instead of a cache"):
        TransformersBackend(pair.folders[0], str(tmp_path / "mamba"))


DECODER = {"is_decoder": True, "is_encoder_decoder": False, "vocab_size": 288}
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    **dict.fromkeys(("openai-gpt", "rwkv", "recurrent_gemma"), ({}, "keeps a state instead of a cache, or neither")),
    **dict.fromkeys(("minimax", "deepseek_v4"), ({}, "keeps states beside its cache")),
    **dict.fromkeys(("bart", "marian", "pegasus", "trocr"), (DECODER, "takes no `position_ids` and would count pad")),
}


@pytest.mark.parametrize("family", UNREAD)
def test_a_model_that_no_batch_can_be_read_with_is_refused_before_it_is_loaded(
    pair: Pair, tmp_path: Path, family: str
) -> None:
    """The folders hold no weights: reading them would fail in another way."""
    fields, words = UNREAD[family]
    CONFIG_MAPPING[family](**fields).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for role, pair_of in (("teacher", ("model", "theta")), ("student", ("theta", "model"))):
        folders = [str(tmp_path / "model") if name == "model" else pair.folders[1] for name in pair_of]
        with pytest.raises(ValueError, match=rf"^The {role} '.*model' \(\w+\) {words}.*; wanted .* Pass another pair"):
            TransformersBackend(*folders)


class HandsOn(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_models_own_code_is_held_to_the_same(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers knows no class for such a configuration: what the loaded model takes is looked at."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    folder, config = tmp_path / "own", BartConfig(**DECODER, **sizes, eos_token_id=EOS, pad_token_id=PAD)
    BartForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    code = "from transformers import BartConfig, BartForCausalLM\nclass OwnConfig(BartConfig):\n"
    code += "    model_type = 'own_bart'\nclass OwnBart(BartForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnBart"}
    fields = json.loads((folder / "config.json").read_text()) | {"auto_map": auto_map, "model_type": "own_bart"}
    (folder / "config.json").write_text(json.dumps(fields))
    for role, models in (("teacher", (str(folder), pair.folders[1])), ("student", (pair.folders[0], str(folder)))):
        words = rf"^The {role} '.*own' \(OwnBart\) takes no `position_ids` and would count padding as tokens"
        with pytest.raises(ValueError, match=words):
            TransformersBackend(*models, device="cpu", trust_remote_code=True)


def test_a_models_own_code_that_hands_positions_on_is_taken(pair: Pair) -> None:
    theta = HandsOn.from_pretrained(pair.folders[1], dtype=torch.float32).eval()
    requests = [ask("a b c" * times, seed=times, max_tokens=5, ignore_eos=True) for times in (1, 7)]
    pair.check(TransformersBackend(pair.folders[0], theta, device="cpu").generate(requests), requests)


SMALL = {"vocab_size": 288, "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.2}
BY_DISTANCE = {
    "bloom": SMALL | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": SMALL | {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128},
}


@pytest.mark.parametrize("family", BY_DISTANCE)
def test_models_without_positions(tmp_path: Path, family: str) -> None:
    """Attention by distances takes no `position_ids`, and padding changes no distance."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**BY_DISTANCE[family]), dtype=torch.float32)
        folders.append(str(tmp_path / str(seed)))
        model.save_pretrained(folders[-1])
        TOKENIZER.save_pretrained(folders[-1])
    several = Pair(folders[0], folders[1])
    requests = [ask("a b c" * times, seed=times, max_tokens=3 * times, ignore_eos=True) for times in (1, 7, 3, 5)]
    several.check(several.backend.generate(requests), requests)


def test_a_setting_that_does_nothing_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`gpu_memory_utilization` is 0\.9 .* wanted .* Drop it"):
        make_backend("transformers", *pair.folders, gpu_memory_utilization=0.9)
    assert make_backend("transformers", *pair.folders, gpu_memory_utilization=0.5, device="cpu").name == "transformers"


def test_a_bad_request_stops_the_call_before_anything_is_read(pair: Pair, batches: list[int]) -> None:
    for prompt, words in (([], "is empty"), ([1] * 512, "context holds 512"), ([-1], "holds token -1")):
        for request in (Request(prompt, [1]), Request([1], prompt)):
            role = "teacher" if request.prompt_ids == prompt else "student"
            with pytest.raises(ValueError, match=f"The {role}'s prompt 1 .*{words}"):
                pair.backend.generate([ask(), request])
    assert batches == []


def test_a_revision_is_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM. The student has no revision of that name: asking for it there would fail."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    new, old, theta = (make_model(tmp_path / name, "llama", seed) for seed, name in enumerate(("new", "old", "theta")))
    names = publish(tmp_path, "me/teacher", main=new, old=old), publish(tmp_path, "me/theta", main=theta)
    for options, folder in (({"revision": "old"}, old), ({}, new)):
        backend = make_backend("transformers", *names, device="cpu", **options)
        wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in backend.teacher.state_dict().items())


def test_every_rank_has_its_weights_under_fsdp(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under accelerate's FSDP transformers leaves zeros in all ranks but the first, for FSDP to fill."""
    wanted = load(pair.folders[1]).state_dict()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    is_first = not dist.is_initialized()  # an engine that this process had may have left a group
    if is_first:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        theirs, own = load(pair.folders[1]), TransformersBackend(*pair.folders, device="cpu").theta
    finally:
        if is_first:
            dist.destroy_process_group()
    assert not any(bool(value.any()) for value in theirs.parameters()), "from_pretrained loads whole weights again"
    assert all(torch.equal(value, wanted[name]) for name, value in own.state_dict().items())


def test_a_stop_text_over_many_tokens(pair: Pair) -> None:
    """The text that is looked at is a tail, as long as the longest stop text: special tokens may lie in between."""
    rows = Rows(
        [ask(stop=("zz", "ab\N{EURO SIGN}cd"), max_tokens=64, ignore_eos=True)], pair.backend.pair, pair.backend.device
    )
    drawn = [*ids("x" * 30 + "ab\N{EURO SIGN}"), *[EOS] * 12, *ids("cd")]
    ended = []
    for rows.step, token in enumerate(drawn, start=1):
        ended.append(rows._ended(0, token))
    assert ended == [False] * (len(drawn) - 1) + [True]
