"""The student's weights replaced in a live engine: what is exact after, what is refused, what it costs in memory."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from helpers.engines import TEXTS, Oracle, request, runner_of, start
from helpers.models import EOS, make_model, make_tokenizer
from optimal_sampling_trl.backends.vllm.families import has_a_class
from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.rollouts.request import Request

pytestmark = pytest.mark.engine
MIXTURES = (Mixture(), Mixture.theta_only(), Mixture.teacher_only(), Mixture("ess_balance"))


LONG = "This prompt fills more than one block of any size, so that its beginning stays in the cache. " * 4


def requests(seed: int = 0) -> list[Request]:
    return [request(text, MIXTURES[i % 4], seed=seed + i) for i, text in enumerate((*TEXTS, LONG, LONG))]


class Live:
    """An engine, and the oracle whose student moves with the engine's."""

    def __init__(self, root: Path, tied: bool) -> None:
        self.teacher = make_model(root / "teacher", "qwen2", 0, hidden=128, heads=4, kv_heads=2, vocab_size=320)
        self.path = make_model(root / "theta", "qwen2", 1, tied=tied)
        self.backend: Any = start(self.teacher, self.path)
        self.oracle = Oracle(self.teacher, self.path)

    @property
    def theta(self) -> nn.Module:
        return self.oracle.models["theta"]

    def step(self, scale: float = 0.02) -> list[tuple[str, Tensor]]:
        """Move the oracle's student, and return what a trainer would push: parameters that want gradients."""
        with torch.no_grad():
            for weight in self.theta.parameters():
                weight.add_(torch.randn_like(weight) * scale)
        return list(self.theta.named_parameters())

    def check(self, seed: int = 0) -> None:
        asked = requests(seed)
        self.oracle.check(self.backend.generate(asked), asked)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("reload"), request.param)
    yield live
    live.backend.close()


def test_between_batches(live: Live) -> None:
    """Exact before and after each reload, also with the prompts that were cached under the old weights."""
    live.check()
    assert live.backend.weight_digest("theta") is None  # the weights are the folder's
    for step in range(3):
        live.backend.load_theta(live.step() if step else iter(live.step()))
        live.check()


def test_storages_stay(live: Live) -> None:
    """CUDA graphs hold addresses; a reload must write to the same ones."""
    model = runner_of(live.backend).model
    before = {name: weight.data_ptr() for name, weight in model.theta.named_parameters()}
    live.backend.load_theta(live.step())
    assert {name: weight.data_ptr() for name, weight in model.theta.named_parameters()} == before


def test_other_types_are_cast(live: Live) -> None:
    """A trainer in bfloat16 and an engine in float32 agree on the rounded weights."""
    weights = [(name, weight.to(torch.bfloat16)) for name, weight in live.step()]
    live.backend.load_theta(weights)
    live.theta.load_state_dict({name: weight.float() for name, weight in weights}, strict=False)
    live.check()


@pytest.mark.parametrize("what", ["missing", "unknown", "shape"])
def test_a_list_that_does_not_fit_changes_nothing(live: Live, what: str) -> None:
    weights = [(name, weight.detach() * 2) for name, weight in live.theta.named_parameters()]
    gone = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        weights = [item for item in weights if item[0] != gone]
        words = f"1 of the student's [0-9]+ weights are missing: {gone}. Wanted the whole set"
    elif what == "unknown":
        weights.append(("base_model.model.lora_A.weight", torch.zeros(1)))
        words = "The student's weight 'base_model.model.lora_A.weight' is none of its checkpoint's"
    else:
        weights[0] = (weights[0][0], torch.zeros(3, 3))
        words = r"has shape \(3, 3\); wanted shape \(288, 64\)"
    with pytest.raises(ValueError, match=words):
        live.backend.load_theta(weights)
    live.check()


def test_a_stream_that_breaks_off_stops_the_engine(live: Live) -> None:
    weights = live.step()
    with pytest.raises(ValueError, match="weights are missing"):
        live.backend.load_theta(iter(weights[:-2]))
    with pytest.raises(RuntimeError, match="refuses to sample: a reload of the student failed half-way"):
        live.backend.generate(requests())
    live.backend.load_theta(iter(weights))
    live.check()


def test_what_fails_before_a_weight_came_changes_nothing(live: Live) -> None:
    def broken() -> Iterator[tuple[str, Tensor]]:
        raise OSError("the disk is gone")
        yield

    with pytest.raises(OSError, match="the disk is gone"):
        live.backend.load_theta(broken())
    live.check()
    live.backend.load_theta(dict(live.step()))  # as `state_dict` has them
    live.check()


def test_the_digest_is_of_the_weights_that_are_in_the_engine(live: Live) -> None:
    live.backend.load_theta(live.step())
    first = live.backend.weight_digest("theta")
    live.backend.load_theta(live.step(0.0))
    assert live.backend.weight_digest("theta") == first
    live.backend.load_theta(live.step())
    assert live.backend.weight_digest("theta") != first


def test_an_engine_that_sleeps_is_named(live: Live) -> None:
    """vLLM would take the requests and never schedule one."""
    live.backend.llm.sleep(level=0)
    try:
        with pytest.raises(RuntimeError, match=r"The engine sleeps\. Call `wake_up\(\)` before"):
            live.backend.generate(requests())
    finally:
        live.backend.llm.wake_up(tags=["scheduling"])
    live.check()


def test_a_neighbour_that_asks_for_all_log_probabilities(live: Live) -> None:
    from vllm import SamplingParams, TokensPrompt

    own, llm = request("hello", seed=3), live.backend.llm
    prompts = [TokensPrompt(prompt_token_ids=own.prompt_ids)] * 2
    recorded = to_sampling_params(own, live.backend.pair.ending)
    every = SamplingParams(max_tokens=3, logprobs=-1, temperature=0.5, seed=1, ignore_eos=True)
    V = live.backend.pair.engine_vocabulary
    llm.llm_engine.model_config.max_logprobs = -1
    outputs = llm.generate(prompts, [recorded, every], use_tqdm=False)
    live.oracle.check(to_rollouts(outputs[:1], [own], live.backend.pair), [own])
    assert [len(token) for token in outputs[1].outputs[0].logprobs] == [V] * 3


def test_refused_while_requests_run(live: Live) -> None:
    from vllm import TokensPrompt

    from optimal_sampling_trl.backends.vllm.requests import to_rollouts, to_sampling_params

    engine, asked = live.backend.llm.llm_engine, request("running", max_tokens=20)
    params = to_sampling_params(asked, live.backend.pair.ending)
    engine.add_request("running", TokensPrompt(prompt_token_ids=asked.prompt_ids), params)
    engine.step()
    with pytest.raises(RuntimeError, match="cannot be reloaded while requests run"):
        live.backend.load_theta([])
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
    live.oracle.check(to_rollouts(outputs, [asked], live.backend.pair), [asked])


def test_cached_blocks_that_stay_are_an_error(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(live.backend.llm), "reset_prefix_cache", lambda self: False)
        with pytest.raises(RuntimeError, match="did not drop the blocks that were cached"):
            live.backend.load_theta(live.step())
    with pytest.raises(RuntimeError, match="refuses to sample: vLLM did not drop"):
        live.backend.generate(requests())
    live.backend.load_theta(live.step(0.0))
    live.check()


def test_a_reload_says_nothing(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM would warn of each layer that has no weights of its own."""
    name = "vllm.model_executor.model_loader.reload.layerwise"
    caplog.set_level(logging.WARNING, logger=name)  # vLLM's loggers pass nothing on
    logging.getLogger(name).addHandler(caplog.handler)
    live.backend.load_theta(live.step(0.0))
    logging.getLogger(name).removeHandler(caplog.handler)
    assert not caplog.records


def test_memory_after_200_reloads(live: Live) -> None:
    """Resident memory after 200 reloads against that after 10, with 8 MiB for the allocator's own noise: the student
    has 0.4 MiB, so a leak of one copy a reload would be 76 MiB."""

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weights, after = live.step(0.0), {}
    for count in range(1, 201):
        live.backend.load_theta(weights)
        if count in (10, 200):
            live.backend.generate(requests())
            after[count] = resident()
    print(f"after 10: {after[10] / 2**20:.1f} MiB, after 200: {after[200] / 2**20:.1f} MiB")
    assert after[200] <= after[10] + 8 * 2**20
    live.check()


def test_nan_is_named_and_harms_no_other(live: Live) -> None:
    """The student's embedding of the letter z is NaN: only the requests that hold one have no solution. A tied student
    uses the embedding for its logits, too, so all of its requests are lost."""
    tied = live.theta.config.tie_word_embeddings
    weights = [(name, weight.detach().clone()) for name, weight in live.theta.named_parameters()]
    texts, z = ("fine", "a z", "fine too", "zz", "ok"), request("z").prompt_ids[0]
    asked = [request(text, MIXTURES[i % 4], seed=i, max_tokens=4) for i, text in enumerate(texts)]
    broken = {name: weight.clone() for name, weight in weights}
    broken["model.embed_tokens.weight"][z] = torch.nan
    live.backend.load_theta(list(broken.items()))
    with pytest.raises(ValueError, match="in 5 request" if tied else "in 2 request") as error:
        live.backend.generate(asked)
    for index in range(5) if tied else (1, 3):
        assert f"request {index}, token 0: the student returned NaN" in str(error.value)
    assert not live.backend.llm.llm_engine.has_unfinished_requests()
    if not tied:
        fine = [asked[i] for i in (0, 2, 4)]
        live.oracle.check(live.backend.generate(fine), fine)
    live.backend.load_theta(weights)
    live.check()


def test_a_head_of_its_own_is_refused_by_a_tied_student(live: Live) -> None:
    """Without a look at its values it would be dropped, and the embedding taken for it."""
    if not live.theta.config.tie_word_embeddings:
        pytest.skip("an untied student has one")
    live.backend.load_theta(live.theta.state_dict())  # the head in it is the embedding
    live.check()
    other = live.theta.state_dict() | {"lm_head.weight": live.theta.get_input_embeddings().weight * 1.5}
    for weights in (other, dict(sorted(other.items()))):  # safetensors sorts by name, so that the head comes first
        with pytest.raises(ValueError, match=r"'lm_head.weight' is no copy of its embedding.*Save the untied student"):
            live.backend.load_theta(weights)
    live.backend.load_theta(dict(sorted(live.theta.state_dict().items())))
    live.check()
    shapes = json.dumps([(name, list(weight.shape)) for name, weight in other.items()])
    (answer,) = live.backend.llm.collective_rpc("refuse_theta_shapes", args=(shapes,))
    assert "is no copy of its embedding" in answer["reason"]


def old_files(folder: Path) -> str:
    """A GPT-NeoX as it was saved years ago, with the buffers of its attention."""
    config = GPTNeoXConfig(
        vocab_size=288, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=512, initializer_range=0.08, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    buffers = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    buffers |= {"rotary_emb.inv_freq": torch.ones(4)}
    named = {f"gpt_neox.layers.{i}.attention.{name}": each.clone() for i in range(2) for name, each in buffers.items()}
    save_file(load_file(file) | named, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("kind", ["experts", "buffers in old files"])
def test_other_names_in_memory_than_on_disk(tmp_path: Path, kind: str) -> None:
    """transformers stacks experts that its files hold one by one, and has no buffers for some in old files. Twice, as
    what is packed at the first load must be packed at each reload."""
    if kind == "experts":
        teacher, theta = (make_model(tmp_path / role, "qwen3_moe", seed) for seed, role in enumerate("ts"))
    elif not has_a_class(GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"])):
        pytest.skip("this vLLM runs GPT-NeoX on its Transformers backend, which is refused")
    else:
        teacher, theta = old_files(tmp_path / "t"), old_files(tmp_path / "s")
    backend, oracle = start(teacher, theta), Oracle(teacher, theta)
    try:
        asked = requests()
        for weights in (list, iter):
            with torch.no_grad():
                for weight in oracle.models["theta"].parameters():
                    weight.add_(torch.randn_like(weight) * 0.02)
            backend.load_theta(weights(oracle.models["theta"].named_parameters()))
            oracle.check(backend.generate(asked), asked)
        with pytest.raises(ValueError, match=r"1 of the student's [0-9]+ weights are missing"):
            backend.load_theta(list(oracle.models["theta"].named_parameters())[:-1])
    finally:
        backend.close()


def test_closed(live: Live) -> None:
    """Last in the file: the engine is gone after."""
    live.backend.close()
    live.backend.close()
    with pytest.raises(RuntimeError, match="This engine was closed"):
        live.backend.generate(requests())
