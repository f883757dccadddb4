"""One live engine, many requests: every record against the oracle, every way of sampling, alone and in a batch."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import ON_A_GPU, TEXTS, TOLERANCE, Oracle, request, runner_of, start
from helpers.models import EOS, TOKENS, make_model, make_spaced_pair
from helpers.oracle import with_wishes
from optimal_sampling_trl.backends.vllm.launch import quiet
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.mixture.dense import measure
from optimal_sampling_trl.mixture.reference import reference
from optimal_sampling_trl.rollouts.dense import SCALARS, Dense
from optimal_sampling_trl.rollouts.request import Request, Sampling

pytestmark = pytest.mark.engine

MIXTURES = {
    "kl_symmetry": Mixture(),
    "ess_balance": Mixture("ess_balance"),
    "trust_region": Mixture("trust_region", epsilon=0.02),
    "entropy": Mixture("entropy"),
    "fixed": Mixture("fixed", fixed_alpha=0.7),
    "narrow": Mixture(alpha_min=0.55, alpha_max=0.9),
    "pinned": Mixture(alpha_min=0.3, alpha_max=0.3),
    "theta": Mixture.theta_only(),
    "teacher": Mixture.teacher_only(),
    "arithmetic": Mixture(form="arithmetic"),
    "arithmetic trust_region": Mixture("trust_region", form="arithmetic"),
    "arithmetic fixed": Mixture("fixed", fixed_alpha=0.2, form="arithmetic"),
    "arithmetic entropy_gate": Mixture("entropy_gate", entropy_scale=8.0, form="arithmetic"),
    "top_k_swap": Mixture("top_k_swap", swap_top_k=90),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Different widths, depths, head counts and padded vocabularies; the student is tied, the teacher is not."""
    root = tmp_path_factory.mktemp("pair")
    teacher = make_model(root / "teacher", "qwen2", 0, hidden=128, layers=3, heads=4, kv_heads=2, vocab_size=320)
    return teacher, make_model(root / "theta", "qwen2", 1, tied=True)


@pytest.fixture(scope="module")
def oracle(pair: tuple[str, str]) -> Oracle:
    return Oracle(*pair)


@pytest.fixture(scope="module")
def backend(pair: tuple[str, str]) -> Any:
    engine = start(*pair)
    yield engine
    engine.close()


def test_every_method_in_one_batch(backend: Any, oracle: Oracle) -> None:
    temperatures = [1.0, 0.7, 1.3, 0.8]
    requests = [
        request(TEXTS[i % len(TEXTS)], mixture, temperature=temperatures[i % 4], seed=i)
        for i, mixture in enumerate(MIXTURES.values())
    ]
    requests = with_wishes(requests)
    rollouts = backend.generate(requests)
    oracle.check(rollouts, requests)
    for rollout, name in zip(rollouts, MIXTURES):
        assert rollout.finish_reason == "length"
        if name in ("theta", "teacher"):
            assert bool((rollout.alpha == (name == "teacher")).all())
            alone = rollout.log_theta if name == "theta" else rollout.log_teacher
            assert torch.allclose(rollout.log_q, alone, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_method_alone(backend: Any, oracle: Oracle, name: str) -> None:
    requests = [request(text, MIXTURES[name], seed=i) for i, text in enumerate(TEXTS[:3])]
    oracle.check(backend.generate(requests), requests)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 20, "temperature": 0.8},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 1.2},
        {"repetition_penalty": 1.4},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 0.8, "temperature": 0.9},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_truncation_and_penalty(backend: Any, oracle: Oracle, settings: dict[str, Any]) -> None:
    mixtures = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("trust_region"))
    mixtures += (Mixture(form="arithmetic"), Mixture("fixed", fixed_alpha=0.2, form="arithmetic"))
    mixtures += (Mixture("top_k_swap", swap_top_k=90),)
    requests = [request(TEXTS[i % 6], mixture, seed=i, **settings) for i, mixture in enumerate(mixtures)]
    requests = with_wishes(requests)
    oracle.check(backend.generate(requests), requests)


def test_greedy_takes_the_mixtures_likeliest_token(backend: Any, oracle: Oracle) -> None:
    mixtures = list(MIXTURES.values())
    requests = with_wishes([request(TEXTS[i % 6], mixture, temperature=0.0) for i, mixture in enumerate(mixtures)])
    rollouts = backend.generate(requests)
    oracle.check(rollouts, requests)
    for rollout in rollouts:
        theta, teacher = oracle.logits(rollout.prompt_ids, rollout.completion_ids)
        _, log_q = reference(theta, teacher, rollout.mixture)
        assert log_q.argmax(-1).tolist() == rollout.completion_ids
    with pytest.raises(ValueError, match="no importance weights"):
        _ = rollouts[0].weight_theta


def test_alone_and_in_a_batch_are_equal(backend: Any) -> None:
    mixtures = list(MIXTURES.values())
    requests = [
        request(
            TEXTS[i % 6], mixtures[i % len(mixtures)], seed=100 + i, temperature=0.5 + i / 20, top_k=0 if i % 2 else 50
        )
        for i in range(24)
    ]
    together = backend.generate(requests)
    for asked, rollout in zip(requests, together):
        (alone,) = backend.generate([asked])
        assert alone.completion_ids == rollout.completion_ids
        for name in ("alpha", "log_q", "log_theta", "log_teacher"):
            assert torch.allclose(getattr(alone, name), getattr(rollout, name), atol=1e-5)


def test_dense_records_of_the_whole_vocabulary(backend: Any, oracle: Oracle) -> None:
    V = backend.pair.vocabulary
    asked = [replace(request(TEXTS[0]), dense=Dense(SCALARS, V))]
    (rollout,) = backend.generate(asked)
    oracle.check([rollout], asked)
    assert rollout.dense.is_first.sum(1).tolist() == [V] * len(rollout.completion_ids)
    with pytest.raises(ValueError, match=f"`top_k` is {V + 1}; wanted a whole number from 0 to {V}"):
        backend.generate([replace(request(TEXTS[0]), dense=Dense(top_k=V + 1))])


def test_a_request_without_a_wish_is_not_measured(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wish no row is measured and no column added; beside a wish a request has its four columns alone."""
    from vllm import TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_sampling_params
    from optimal_sampling_trl.backends.vllm.worker import dense

    measured: list[int] = []

    def spy(*arguments: Any) -> Any:
        measured.append(len(arguments[6]))  # the rows
        return measure(*arguments)

    monkeypatch.setattr(dense, "measure", spy)
    requests = [request(TEXTS[i], seed=i) for i in range(3)]
    without = backend.generate(requests)
    assert measured == []
    requests[1] = replace(requests[1], dense=Dense(("overlap",), 2))
    prompts = [TokensPrompt(prompt_token_ids=one.prompt_ids) for one in requests]
    parameters = [to_sampling_params(one, backend.pair.ending) for one in requests]
    outputs = [output.outputs[0] for output in backend.llm.generate(prompts, parameters, use_tqdm=False)]
    assert measured == [1] * 12
    assert [len(one.logprobs[0]) for one in outputs] == [4, 4 + 1 + 8, 4]
    assert [list(one.token_ids) for one in outputs] == [one.completion_ids for one in without]


def test_group_of_four(backend: Any, oracle: Oracle) -> None:
    """A group is one prompt asked for again: half from the student, half from the mixture, all different."""
    requests = [request(TEXTS[2], Mixture.theta_only() if i % 2 else Mixture(), seed=i) for i in range(4)]
    requests = [replace(one, dense=Dense(SCALARS, 5)) for one in requests]
    rollouts = backend.generate(requests)
    oracle.check(rollouts, requests)
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) == 4


def test_no_seed_draws_from_torchs_generator(backend: Any) -> None:
    requests = [request(TEXTS[0], seed=None)] * 3
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([rollout.completion_ids for rollout in backend.generate(requests)])
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == 3


def test_five_hundred_requests(backend: Any, oracle: Oracle) -> None:
    mixtures = list(MIXTURES.values())
    requests = [request(f"{i} {TEXTS[i % 6]}", mixtures[i % 12], seed=i, max_tokens=1 + i % 7) for i in range(500)]
    rollouts = backend.generate(requests)
    assert [len(rollout.completion_ids) for rollout in rollouts] == [1 + i % 7 for i in range(500)]
    oracle.check(rollouts, requests)


@pytest.mark.parametrize("seeded", [True, False])
def test_tokens_are_drawn_from_q(backend: Any, oracle: Oracle, seeded: bool) -> None:
    """Chi-square of 2000 first tokens against the oracle's q. The threshold is the chi-square's quantile at 1e-6, so
    the test fails by luck once in a million sets of seeds; these seeds are fixed."""
    asked, draws = request("chi", Mixture(), max_tokens=1), 2000
    torch.manual_seed(0)
    requests = [request("chi", Mixture(), max_tokens=1, seed=i if seeded else None) for i in range(draws)]
    counts = Counter(rollout.completion_ids[0] for rollout in backend.generate(requests))
    theta, teacher = oracle.logits(asked.prompt_ids, [0])
    expected = reference(theta, teacher, asked.mixture)[1][0].exp() * draws
    common = expected >= 5
    observed = torch.tensor([counts.get(token, 0) for token in range(len(expected))], dtype=torch.float64)
    pooled = torch.stack([observed, expected])
    pooled = torch.cat([pooled[:, common], pooled[:, ~common].sum(1, keepdim=True)], dim=1)
    statistic = float(((pooled[0] - pooled[1]).square() / pooled[1]).sum())
    freedom = pooled.shape[1] - 1
    # Wilson and Hilferty's cube root: the normal quantile of 1e-6 is 4.753.
    threshold = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    print(f"chi-square {statistic:.1f}, {freedom} degrees of freedom, threshold {threshold:.1f}")
    assert statistic < threshold


def test_the_weights_of_the_student_average_to_one(backend: Any, oracle: Oracle) -> None:
    """E_q[θ/q] = 1: 2000 first tokens, within 5 standard errors (fails by luck once in 1.7 million sets of seeds)."""
    requests = [request("mean", Mixture(), max_tokens=1, seed=i) for i in range(2000)]
    weights = torch.cat([rollout.weight_theta for rollout in backend.generate(requests)]).double()
    assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / math.sqrt(2000)


def test_padded_ids_are_never_drawn(backend: Any) -> None:
    """The teacher scores 320 ids and the student 288: above 288 q has no mass."""
    requests = [request(TEXTS[i % 6], Mixture.teacher_only(), seed=i, temperature=2.0) for i in range(30)]
    assert max(max(rollout.completion_ids) for rollout in backend.generate(requests)) < 288


def test_ends(backend: Any, oracle: Oracle) -> None:
    requests = [request(TEXTS[i % 6], seed=i, ignore_eos=False, max_tokens=90, temperature=2.0) for i in range(20)]
    rollouts = backend.generate(requests)
    oracle.check(rollouts, requests)
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert stopped
    for rollout in rollouts:
        assert EOS not in rollout.completion_ids[:-1]
        assert (rollout.completion_ids[-1] == EOS) == (rollout.finish_reason == "stop")
        assert "<eos>" not in rollout.text


def test_stop_texts(backend: Any, oracle: Oracle) -> None:
    (free,) = backend.generate([request(TEXTS[1], max_tokens=30)])
    stop = free.text[6:8]
    requests = [request(TEXTS[1], max_tokens=30, stop=(stop,)), request(TEXTS[1], max_tokens=30)]
    requests = [replace(one, dense=Dense(SCALARS, 3)) for one in requests]
    cut, same = backend.generate(requests)
    oracle.check([cut, same], requests)
    assert same.text == free.text
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.completion_ids == free.completion_ids[: len(cut.completion_ids)]


def test_a_stop_text_that_never_comes_changes_no_text(backend: Any) -> None:
    """Half a character at a completion's end is shown as such, with stop texts and without."""
    free, stopped = (
        backend.generate([request(TEXTS[i % 6], seed=i, stop=stop) for i in range(40)])
        for stop in ((), ("never there",))
    )
    assert [one.text for one in stopped] == [one.text for one in free]
    assert any(one.text.endswith("\N{REPLACEMENT CHARACTER}") for one in free)


def test_the_text_ends_before_the_first_stop_text(backend: Any) -> None:
    """Of two that end at one token, too, and whichever is named first: as on transformers and from a server."""
    (free,) = backend.generate([request(TEXTS[1], max_tokens=30)])
    end = next(i for i in range(6, 30) if free.text[i - 1 : i + 1].isascii() and free.text.index(free.text[i]) == i)
    stops = free.text[end], free.text[end - 1 : end + 1]
    for cut in backend.generate([request(TEXTS[1], max_tokens=30, stop=stop) for stop in (stops, stops[::-1])]):
        assert cut.text == free.text[: end - 1]


def test_stop_texts_where_tokens_carry_spaces(tmp_path: Path) -> None:
    """vLLM cannot turn an id beyond the vocabulary into text with such a tokenizer: its engine would die of it."""
    from vllm import SamplingParams, TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

    engine = start(*make_spaced_pair(tmp_path))
    try:
        (free,) = engine.generate([request(TEXTS[1], max_tokens=30)])
        place = free.text.index(" ", 4)
        stops = ((), ("never there",), (free.text[place : place + 2],))
        asked = [request(TEXTS[1], max_tokens=30, stop=stop) for stop in stops]
        params = [to_sampling_params(one, engine.pair.ending) for one in asked]
        plain = SamplingParams(max_tokens=30, seed=0, logprobs=2, ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=asked[0].prompt_ids)
        *outputs, other = engine.llm.generate([prompt] * 4, [*params, plain], use_tqdm=False)
        for rollout, stop in zip(to_rollouts(outputs, asked, engine.pair), stops, strict=True):
            found = free.text.find(stop[0]) if stop else -1
            assert rollout.text == (free.text if found == -1 else free.text[:found])
            assert rollout.finish_reason == ("length" if found == -1 else "stop")
        for token, columns in zip(other.outputs[0].token_ids, other.outputs[0].logprobs, strict=True):
            raw = engine.tokenizer.convert_ids_to_tokens(token)
            assert columns[token].decoded_token == raw.replace("▁", " "), "a stranger's request keeps its texts"
    finally:
        engine.close()


def test_the_context_ends_a_completion(backend: Any, oracle: Oracle) -> None:
    requests = [request("a" * 505, max_tokens=100)]
    (rollout,) = backend.generate(requests)
    assert rollout.finish_reason == "length"
    assert 6 <= len(rollout.completion_ids) <= 8
    oracle.check([rollout], requests)


@pytest.mark.parametrize(
    ("prompt", "theta_prompt", "words"),
    [
        ([], [], "prompt 1 is empty"),
        ([1] * 512, [1] * 512, "prompt 1 has 512 tokens, but the context holds 512"),
        ([300], [300], "prompt 1 holds token 300; wanted ids from 0 to 287"),
    ],
)
def test_a_request_that_cannot_be_served(backend: Any, prompt: list[int], theta_prompt: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        backend.generate([request("fine"), Request(prompt, theta_prompt, Mixture(), Sampling())])
    assert not backend.llm.llm_engine.has_unfinished_requests()
    assert backend.generate([]) == []


def test_a_stop_text_that_no_text_can_hold(backend: Any) -> None:
    with pytest.raises(ValueError, match="Request 1 has the stop text '<pad>'"):
        backend.generate([request("fine", stop=("<eos>",), ignore_eos=False), request("x", stop=("<pad>",))])
    assert not backend.llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change(backend: Any, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"Request 0 has `temperature` {temperature}; wanted 0, or 0.01 to 2"):
        backend.generate([request("x", temperature=temperature)])


@pytest.fixture
def teacher_steps(backend: Any) -> Iterator[list[int]]:
    """How many tokens the teacher read in each of its steps."""
    steps: list[int] = []
    teacher = runner_of(backend).model.teacher
    handle = teacher.register_forward_pre_hook(lambda _, given: steps.append(len(given[0])))
    yield steps
    handle.remove()


@pytest.mark.parametrize("mixture", [Mixture.theta_only(), Mixture("trust_region", epsilon=0.0)])
def test_the_student_alone(mixture: Mixture, backend: Any, oracle: Oracle, teacher_steps: list[int]) -> None:
    """The same tokens, log q and log θ as beside the teacher, which reads nothing; nothing is left in the caches."""
    long = [text + "a long prompt of several blocks" * 8 for text in TEXTS]
    settings = {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.2}
    both = [request(text, mixture, seed=i, **settings) for i, text in enumerate(long)]
    alone = [replace(one, needs_teacher=False) for one in both]
    without = backend.generate(alone)
    assert not teacher_steps
    mixed = with_wishes([request(text, seed=i) for i, text in enumerate(long)])  # their prompts are cached, or were
    oracle.check(backend.generate(mixed), mixed)
    with_it = backend.generate(both)
    oracle.check(with_it, both)
    for one, other in zip(without, with_it, strict=True):
        assert one.completion_ids == other.completion_ids
        assert torch.equal(one.alpha, torch.zeros(12))
        assert torch.allclose(one.log_q, other.log_q, atol=1e-5)
        assert torch.allclose(one.log_theta, other.log_theta, atol=1e-5)
        assert bool(one.log_teacher.isnan().all())


def test_one_request_for_the_teacher_is_enough(backend: Any, oracle: Oracle, teacher_steps: list[int]) -> None:
    asked = [request(text, seed=i) for i, text in enumerate(TEXTS[:3])]
    alone = replace(request(TEXTS[3], Mixture.theta_only()), needs_teacher=False)
    *rollouts, last = backend.generate([*asked, alone])
    oracle.check(rollouts, asked)
    assert teacher_steps
    assert bool(last.log_teacher.isnan().all())


def test_the_teacher_runs_where_other_requests_do(backend: Any, oracle: Oracle) -> None:
    from vllm import TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

    other, engine = request(TEXTS[0]), backend.llm.llm_engine
    params = to_sampling_params(other, backend.pair.ending)
    engine.add_request("other", TokensPrompt(prompt_token_ids=other.prompt_ids), params)
    outputs = []
    with backend._alone(True):
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
    oracle.check(to_rollouts(outputs, [other], backend.pair), [other])


def test_plain_requests_beside_recorded_ones(backend: Any, oracle: Oracle) -> None:
    """A user of the same engine who asks for vLLM's own likeliest tokens gets them, and the mixture of the default."""
    from vllm import SamplingParams, TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

    asked = with_wishes([request(text, seed=i) for i, text in enumerate(TEXTS[:3])])
    recorded = [to_sampling_params(one, backend.pair.ending) for one in asked]
    plain = [SamplingParams(max_tokens=12, seed=0, logprobs=k, ignore_eos=True) for k in (5, None, 1)]
    params = [one for both in zip(recorded, plain) for one in both]
    prompts = [TokensPrompt(prompt_token_ids=one.prompt_ids) for one in asked for _ in range(2)]
    outputs = backend.llm.generate(prompts, params, use_tqdm=False)
    oracle.check(to_rollouts(outputs[::2], asked, backend.pair), asked)
    assert outputs[3].outputs[0].logprobs is None
    for output, k in ((outputs[1], 5), (outputs[5], 1)):
        ids, completion = output.prompt_token_ids, output.outputs[0]
        theta, teacher = oracle.logits(ids, completion.token_ids)
        log_q = reference(theta, teacher, Mixture())[1]
        for row, token, got in zip(log_q, completion.token_ids, completion.logprobs):
            assert set(got) == {token, *row.topk(k).indices.tolist()}
            assert all(abs(one.logprob - float(row[index])) < TOLERANCE for index, one in got.items())


def test_an_aborted_request_leaves_the_others_alone(backend: Any, oracle: Oracle) -> None:
    from vllm import TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

    engine = backend.llm.llm_engine
    asked = [request(text, mixture, seed=i) for i, (text, mixture) in enumerate(zip(TEXTS, MIXTURES.values()))]
    names = [
        engine.add_request(f"abort-{i}", TokensPrompt(prompt_token_ids=one.prompt_ids), params)
        for i, one in enumerate(asked)
        for params in [to_sampling_params(one, backend.pair.ending)]
    ]
    done: dict[str, Any] = {}
    for step in range(100):
        done |= {output.request_id: output for output in engine.step() if output.finished}
        if step == 3:
            engine.abort_request([names[1], names[4]], internal=True)
        if not engine.has_unfinished_requests():
            break
    left = [i for i in range(len(asked)) if i not in (1, 4)]
    outputs = [next(output for name, output in done.items() if name.startswith(f"abort-{i}")) for i in left]
    kept = [asked[i] for i in left]
    rollouts = to_rollouts(outputs, kept, backend.pair)
    oracle.check(rollouts, kept)
    assert all(len(rollout.completion_ids) == 12 for rollout in rollouts)


def test_an_interrupt_leaves_nothing_behind(backend: Any, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = backend.llm.llm_engine, []
    whole = engine.step

    def step() -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole()

    asked = [request(text, seed=i) for i, text in enumerate(TEXTS)]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            backend.generate(asked)
    assert not engine.has_unfinished_requests()
    oracle.check(backend.generate(asked[:2]), asked[:2])


def test_a_grammar_holds_at_any_alpha(backend: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            max_tokens=8, seed=1, structured_outputs=StructuredOutputsParams(regex="[0-9]{4}"), extra_args=m.to_dict()
        )
        for m in (Mixture.theta_only(), Mixture.teacher_only(), Mixture())
    ]
    for output in backend.llm.generate(["a number: "] * 3, params, use_tqdm=False):
        assert output.outputs[0].text.isdigit()
        assert len(output.outputs[0].text) == 4


@pytest.mark.parametrize("mixture", [Mixture(), Mixture("ess_balance"), Mixture(form="arithmetic")], ids=str)
def test_under_a_grammar_q_is_that_of_both_models_without_other_tokens(
    backend: Any, oracle: Oracle, mixture: Mixture
) -> None:
    """vLLM masks the teacher's logits before the mixture; held to q, the student would have all the weight."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    digits = [backend.tokenizer(str(digit))["input_ids"][0] for digit in range(10)]
    grammar = {"structured_outputs": StructuredOutputsParams(regex="[0-9]{4}"), "extra_args": mixture.to_dict()}
    params = SamplingParams(max_tokens=4, seed=1, logprobs=1, **grammar)
    ids = request("a number: ").prompt_ids
    completion = backend.llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)[0].outputs[0]
    assert set(completion.token_ids) <= set(digits)
    sides = [side[:, digits] for side in oracle.logits(ids, completion.token_ids)]
    alpha, log_q = reference(*sides, mixture)
    assert bool(((alpha > 0) & (alpha < 1)).all())
    for row, token, got in zip(log_q, completion.token_ids, completion.logprobs):
        assert abs(got[token].logprob - float(row[digits.index(token)])) < TOLERANCE


def test_what_nobody_may_ask_of_an_engine_in_this_process(backend: Any, oracle: Oracle) -> None:
    """Whoever holds `backend.llm` makes the parameters, so that they are checked where the engine takes them."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    from optimal_sampling_trl.backends.vllm.requests import to_sampling_params

    one, V = request("hello"), backend.pair.vocabulary
    recorded = to_sampling_params(one, backend.pair.ending)
    recorded.structured_outputs = StructuredOutputsParams(regex="[0-9]{4}")
    refused = [
        (recorded, "structured outputs and for records.*wanted one of the two"),
        (SamplingParams(allowed_token_ids=[V, V + 1]), f"`allowed_token_ids` names the token {V + 1}.*below {V}"),
        (SamplingParams(logit_bias={V: 100.0}), f"`logit_bias` names the token {V}"),
        (SamplingParams(extra_args={"epsilon": 0.1}), "`epsilon` is 0.1, and the method 'kl_symmetry' does not read"),
    ]
    for name, value, words in (  # of later versions of vLLM
        ("prompt_logprob_token_ids", [5, 6], r"is \[5, 6\], and vLLM computes it of the teacher alone; .*alpha_min 1"),
        ("trace_decode_token_ids", [5, V], f"names the token {V}, which is never drawn; wanted ids below {V}"),
    ):
        if name in SamplingParams.__struct_fields__:
            refused.append((SamplingParams(**{name: value}), f"`{name}` {words}"))
    for name in ("prompt_logprob_token_ids", "logprob_token_ids"):
        if name in SamplingParams.__struct_fields__:
            params = to_sampling_params(replace(one, mixture=Mixture.teacher_only()), backend.pair.ending)
            setattr(params, name, [5, 6, 7])
            refused.append((params, rf"`{name}` is \[5, 6, 7\] in a request for records, .*ask without records"))
    for params, words in refused:
        with pytest.raises(ValueError, match=words):
            backend.llm.generate([TokensPrompt(prompt_token_ids=one.prompt_ids)] * 2, params, use_tqdm=False)
    assert not backend.llm.llm_engine.has_unfinished_requests()
    oracle.check(backend.generate([one]), [one])


@pytest.mark.skipif(ON_A_GPU, reason="on a GPU an engine sleeps, or refuses where it was built without")
def test_sleep_is_nothing_on_a_cpu(backend: Any) -> None:
    backend.sleep()
    backend.wake_up()
    assert TOKENS == 258
    assert len(backend.generate([request("awake")])) == 1


def test_float32_is_not_rounded_without_a_word(pair: tuple[str, str]) -> None:
    """vLLM's own default for such files is bfloat16, which it logs where nobody looks."""
    with pytest.warns(
        UserWarning, match=r"hold torch\.float32, and vLLM samples with torch\.bfloat16.*dtype='float32'"
    ):
        start(*pair, dtype="auto").close()


def test_vllm_is_quiet_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("vllm")
    before = logger.level
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    quiet()
    assert (os.environ["VLLM_LOGGING_LEVEL"], logger.level) == ("INFO", before)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    quiet()
    assert (os.environ.pop("VLLM_LOGGING_LEVEL"), logger.level) == ("WARNING", logging.WARNING)
    logger.setLevel(before)
