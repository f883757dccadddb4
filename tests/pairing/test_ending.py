"""Where completions end: every place that names an ending, and endings that are no token of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.models import EOS, PAD, make_model, make_tokenizer
from optimal_sampling_trl.backends.transformers import TransformersBackend
from optimal_sampling_trl.mixture import Mixture
from optimal_sampling_trl.pairing import Ending, Pair, end_of_sequence, stop_tokens
from optimal_sampling_trl.pairing.ending import special_tokens
from optimal_sampling_trl.rollouts.request import Request, Sampling

Z = make_tokenizer().convert_tokens_to_ids("z")


def config(*eos: int) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(eos))


def test_the_teachers_tokenizer_may_name_its_ending_alone() -> None:
    assert end_of_sequence(config(EOS), config(EOS), EOS, teacher_eos=Z) == Ending((EOS,), (Z,))
    assert end_of_sequence(config(EOS), config(EOS, Z), EOS, teacher_eos=Z) == Ending((EOS, Z), ())
    assert end_of_sequence(config(), config(EOS), None, teacher_eos=None) == Ending((EOS,), ())


def test_endings_that_are_no_token_of_both_models_are_left_out() -> None:
    assert end_of_sequence(config(300, 5), config(EOS, 400, -1), EOS, 301, vocabulary=288) == Ending((EOS,), (5,))
    assert stop_tokens(config(EOS, 400), 287, vocabulary=288) == (287, EOS)


def test_special_tokens_are_those_that_a_text_leaves_out() -> None:
    """Those that the tokenizer has no name for, too, as Llama 3's `<|eot_id|>`; not other added ones."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True), AddedToken("<tool>", special=False)])
    assert special_tokens(tokenizer) == {EOS: "<eos>", PAD: "<pad>", 258: "<|eot|>"}
    assert tokenizer.decode([Z, EOS, PAD, 258, 259], skip_special_tokens=True) == "z<tool>"


@pytest.mark.parametrize("text", ["<pad>", "\n<pad>", "<eos>"])
def test_a_stop_text_that_no_text_can_hold(text: str) -> None:
    pair = Pair("", "", make_tokenizer(), 258, 258, 64, Ending((EOS, PAD), ()))
    pair.check_stop_texts(("z", "<", "pad>"), True, 3)
    pair.check_stop_texts(("z", text), False, 3)  # it ends there anyway
    id, token = (EOS, "<eos>") if text == "<eos>" else (PAD, "<pad>")
    with pytest.raises(ValueError, match="`eos_token_id` in the student's generation config") as error:
        pair.check_stop_texts(("z", text), True, 3)
    assert f"Request 3 has the stop text {text!r}, and {token!r} is a special token" in str(error.value)
    assert f"add its id, {id}, to" in str(error.value)


def test_a_special_token_ends_where_the_refusal_says(tmp_path: Path) -> None:
    folders = models(tmp_path)
    asked = [Request([1, 2], [1, 2], Mixture(), Sampling(max_tokens=200, seed=i, stop=("<pad>",))) for i in range(8)]
    with pytest.raises(ValueError, match=r"Request 0 has the stop text '<pad>'.*`generation_config\.json`"):
        TransformersBackend(*folders, device="cpu").generate(asked)
    config(EOS, PAD).save_pretrained(folders[1])
    rollouts = TransformersBackend(*folders, device="cpu").generate(asked)
    assert PAD in {rollout.completion_ids[-1] for rollout in rollouts if rollout.finish_reason == "stop"}
    unending = Request([1, 2], [1, 2], Mixture(), Sampling(stop=("<pad>",), ignore_eos=True))
    with pytest.raises(ValueError, match="Request 0 has the stop text '<pad>'"):
        TransformersBackend(*folders, device="cpu").generate([unending])


def models(root: Path, **teacher: Any) -> tuple[str, str]:
    return make_model(root / "teacher", "qwen2", 0, **teacher), make_model(root / "theta", "qwen2", 1)


def name_ending(folder: str, token: str) -> Any:
    """The folder's tokenizer with another end token, saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_teachers_ending_beyond_the_common_vocabulary(tmp_path: Path) -> None:
    """It has no logit to fold: all of its mass is cut off with the padding."""
    backend = TransformersBackend(*models(tmp_path, vocab_size=320, eos_token_id=[310, EOS]), device="cpu")
    assert backend.pair.ending == Ending((EOS,), ())
    request = Request([1, 2], [1, 2], Mixture(), Sampling(max_tokens=3, seed=0))
    assert len(backend.generate([request])[0].completion_ids) > 0


class Places:
    """Ways to name an ending for a student: each changes what is passed, or its folder."""

    def folder_tokenizer(self, theta: str) -> dict[str, Any]:
        name_ending(theta, "z")
        return {}

    def tokenizer_passed(self, theta: str) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(theta)
        tokenizer.eos_token = "z"
        return {"tokenizer": tokenizer}

    def folder_settings(self, theta: str) -> dict[str, Any]:
        config(EOS, Z).save_pretrained(theta)
        return {}

    def model_passed(self, theta: str) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(theta)
        model.generation_config.eos_token_id = [EOS, Z]
        return {"theta": model}


PLACES = [name for name in vars(Places) if not name.startswith("_")]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_that_names_the_students_ending(tmp_path: Path, place: str) -> None:
    teacher, theta = models(tmp_path)
    given = {"theta": theta} | getattr(Places(), place)(theta)
    backend = TransformersBackend(teacher, given.pop("theta"), device="cpu", **given)
    assert set(backend.pair.ending.stop) == {EOS, Z}
    prompts = [[token] for token in range(64)]
    requests = [Request(p, p, Mixture(), Sampling(max_tokens=60, temperature=2.0, seed=p[0])) for p in prompts]
    rollouts = backend.generate(requests)
    assert any(rollout.completion_ids[-1] == Z for rollout in rollouts)
    assert not any({EOS, Z} & set(rollout.completion_ids[:-1]) for rollout in rollouts)


@pytest.mark.parametrize("place", PLACES)
def test_the_fused_engine_is_built_on_the_same_endings(tmp_path: Path, place: str) -> None:
    """Of a trainer's model and tokenizer, where it loads the student from its folder."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from optimal_sampling_trl.backends import choose

    teacher, theta = models(tmp_path)
    given = getattr(Places(), place)(theta)
    settings = getattr(given.get("theta"), "generation_config", None)
    choice = choose("vllm", teacher, theta, {}, tokenizer=given.get("tokenizer"), theta_settings=settings)
    assert choice.pair is not None
    assert set(choice.pair.ending.stop) == {EOS, Z}


def test_the_teachers_own_tokenizer(tmp_path: Path) -> None:
    teacher, theta = models(tmp_path)
    name_ending(teacher, "z")
    assert TransformersBackend(teacher, theta, device="cpu").pair.ending == Ending((EOS,), (Z,))


def test_folding_finds_every_ending() -> None:
    logits = torch.randn(3, 288)
    ending = end_of_sequence(config(Z, 290), config(EOS), EOS, PAD, vocabulary=288)
    folded = ending.fold(logits)
    mass = logits.exp()
    assert torch.allclose(folded[:, EOS].exp(), mass[:, EOS] + mass[:, Z] + mass[:, PAD])
    assert bool(folded[:, [Z, PAD]].isneginf().all())
