"""Every field of TRL's three configurations is read, refused or named: none does nothing without a word."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import trl

import optimal_sampling_trl
from helpers.training import KINDS, make_trainer
from optimal_sampling_trl import Mixture
from optimal_sampling_trl.trainers.unread import unread_settings

CONFIGS = ("GRPO", "RLOO", "Distillation")
READ: dict[str, Any] = {
    # by transformers' trainer
    **{"learning_rate": 1e-3, "bf16": True, "gradient_checkpointing": False, "logging_steps": 3},
    **{"remove_unused_columns": True, "lr_scheduler_kwargs": {}, "torch_empty_cache_steps": 5},
    # by TRL's: models, data, batches
    **{"model_init_kwargs": {"dtype": "float32"}, "trust_remote_code": True, "router_aux_loss_coef": 0.1},
    **{
        "disable_dropout": True,
        "use_liger_kernel": True,
        "cast_lm_head_to_fp32": True,
        "shuffle_dataset": False,
        "pad_to_multiple_of": 8,
    },
    **{"num_generations": 4, "num_generations_eval": 2, "generation_batch_size": 16, "steps_per_generation": 2},
    "chat_template_kwargs": {"enable_thinking": False},
    # by TRL's loss, rewards and tables
    **{"beta": 0.1, "num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "bnpo"},
    **{"reward_weights": [2.0], "multi_objective_aggregation": "normalize_then_sum", "reward_clip_range": (0, 1)},
    **{"normalize_advantages": True, "mask_truncated_completions": True, "top_entropy_quantile": 0.5},
    **{"entropy_coef": 0.1, "use_adaptive_entropy": True, "log_completions": True, "sync_ref_model": True},
    "vllm_importance_sampling_correction": True,
    # by our sampling
    **{"max_completion_length": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    **{"generation_kwargs": {"top_k": 3}, "repetition_penalty": 1.2, "vllm_mode": "server"},
}
"""Fields that are always read, with a value that is not their default."""
BY_TRANSFORMERS = {
    *("learning_rate", "bf16", "gradient_checkpointing", "logging_steps", "remove_unused_columns"),
    *("lr_scheduler_kwargs", "torch_empty_cache_steps", "use_liger_kernel"),
}
"""Those of them that TRL gives another default or type, and that transformers reads."""
READ_WHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sapo_temperature_pos": (2.0, {"loss_type": "sapo"}),
    "sapo_temperature_neg": (2.0, {"loss_type": "sapo", "positive_only": "mixture"}),
    **{f"vespo_{name}_pos": (2.5, {"loss_type": "vespo"}) for name in ("k", "lambda")},
    **{f"vespo_{name}_neg": (2.5, {"loss_type": "vespo", "positive_only": "none"}) for name in ("k", "lambda")},
    "delta": (4.0, {"positive_only": "none"}),
    "off_policy_mask_threshold": (0.5, {"positive_only": "none"}),
    "ref_model_mixup_alpha": (0.5, {"sync_ref_model": True}),
    "ref_model_sync_steps": (8, {"sync_ref_model": True}),
    "use_bias_correction_kl": (False, {"beta": 0.1}),
    "entropy_coef_min": (0.1, {"use_adaptive_entropy": True}),
    "entropy_coef_max": (0.5, {"use_adaptive_entropy": True}),
    "entropy_coef_delta": (0.1, {"use_adaptive_entropy": True}),
    "entropy_target": (0.5, {"use_adaptive_entropy": True}),
    "vllm_importance_sampling_mode": ("token_mask", {"vllm_importance_sampling_correction": True}),
    "vllm_importance_sampling_clip_max": (2.0, {"vllm_importance_sampling_correction": True}),
    "vllm_importance_sampling_clip_min": (0.5, {"vllm_importance_sampling_correction": True}),
    "num_completions_to_print": (3, {"log_completions": True}),
    "log_unique_prompts": (True, {"log_completions": True}),
    "vllm_server_base_url": ("http://127.0.0.1:1", {"vllm_mode": "server"}),
    "vllm_server_host": ("127.0.0.1", {"vllm_mode": "server"}),
    "vllm_server_port": (8001, {"vllm_mode": "server"}),
    "vllm_server_timeout": (9.0, {"vllm_mode": "server"}),
    "vllm_group_port": (8002, {"vllm_mode": "server"}),
}
"""Fields that are read beside others alone: a value, and those others."""
READ_UNLESS: dict[str, tuple[Any, dict[str, Any]]] = {
    "epsilon": (0.3, {"epsilon_high": 0.4}),  # the lower bound is for advantages below 0
    "epsilon_high": (0.3, {"loss_type": "sapo"}),
    "scale_rewards": ("none", {"multi_objective_aggregation": "normalize_then_sum"}),
    "vllm_gpu_memory_utilization": (0.5, {"vllm_mode": "server"}),
    "vllm_max_model_length": (64, {"vllm_mode": "server"}),
    "vllm_tensor_parallel_size": (2, {"vllm_mode": "server"}),
    "vllm_enable_sleep_mode": (True, {"vllm_mode": "server"}),
    "vllm_model_impl": ("auto", {"vllm_mode": "server"}),
}
"""Fields that are read but beside others: a value, and those others."""
NEVER: dict[str, Any] = {
    "cache_implementation": "static",
    "transformers_continuous_batching_config": {"max_memory_percent": 0.5},
    "ds3_gather_for_generation": False,
    "log_multimodal": False,
    "max_tool_calling_iterations": 3,
}
"""Fields that nothing reads, each with a value."""
REFUSED = {
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "vllm_structured_outputs_regex": "[0-9]+",
    "teacher_model_name_or_path": "other",
    "teacher_model_revision": "v2",
    "teacher_model_init_kwargs": {"revision": "v2"},
}
"""Fields that a trainer refuses, with a value that it refuses."""
BY_TRL = {
    "use_vllm": "the trainers set it: TRL's word for any engine",
    "log_completions_hub_repo": "TRL refuses it without `log_completions`",
    "vllm_importance_sampling_cap": "TRL's older name of `vllm_importance_sampling_clip_max`, into which it copies it",
}
"""Fields about which TRL says all there is to say."""
PLACES = (READ, READ_WHERE, READ_UNLESS, NEVER, REFUSED, BY_TRL)


def fields_of(name: str) -> set[str]:
    """Fields that TRL's configuration has beyond those of transformers, or with another default."""
    config = getattr(trl, f"{name}Config")
    return {
        field
        for base in config.__mro__
        if base.__module__.startswith("trl")
        for field in inspect.get_annotations(base)
        if field in config.__dataclass_fields__
    }


def config_with(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    given = {"use_cpu": True, "report_to": "none", "bf16": False, **settings}
    return getattr(optimal_sampling_trl, f"{name}Config")(str(folder), **given)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_has_its_place(name: str) -> None:
    places = {field: [where for where in PLACES if field in where] for field in fields_of(name)}
    none = sorted(field for field, found in places.items() if not found)
    assert not none, f"TRL's {name}Config has new fields: {none}. Is each read, and by which trainer? Give it a place."
    twice = sorted(field for field, found in places.items() if len(found) > 1)
    assert not twice


def test_no_place_is_of_a_field_that_is_gone() -> None:
    every = set().union(*map(fields_of, CONFIGS))
    gone = sorted(field for where in PLACES for field in where if field not in every)
    assert not gone


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_called_read_is_read(name: str) -> None:
    """By TRL's trainer, which hands what is of sampling to our engines: the name stands in its source."""
    trainer = sys.modules[getattr(trl, f"{name}Trainer").__module__]
    source = inspect.getsource(trainer) + inspect.getsource(trl.trainer.callbacks)
    attributes = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    wanted = fields_of(name) & (READ.keys() | READ_WHERE.keys() | READ_UNLESS.keys()) - BY_TRANSFORMERS
    assert sorted(wanted - attributes) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_is_not_named(name: str, tmp_path: Path) -> None:
    for field in sorted(fields_of(name) & READ.keys()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = config_with(name, tmp_path, {field: READ[field]})
        assert field not in unread_settings(args), field
    assert unread_settings(config_with(name, tmp_path, {})) == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_beside_others_is_named_without_them(name: str, tmp_path: Path) -> None:
    known = getattr(optimal_sampling_trl, f"{name}Config").__dataclass_fields__
    for field in sorted(fields_of(name) & READ_WHERE.keys()):
        value, others = READ_WHERE[field]
        beside = {other: setting for other, setting in others.items() if other in known}
        assert field not in unread_settings(config_with(name, tmp_path, {field: value, **beside})), field
        if beside:
            assert list(unread_settings(config_with(name, tmp_path, {field: value}))) == [field]
    for field in sorted(fields_of(name) & READ_UNLESS.keys()):
        value, others = READ_UNLESS[field]
        assert field not in unread_settings(config_with(name, tmp_path, {field: value})), field
        if others.keys() <= known.keys():
            assert field in unread_settings(config_with(name, tmp_path, {field: value, **others})), field
    for field in sorted(fields_of(name) & NEVER.keys()):
        assert list(unread_settings(config_with(name, tmp_path, {field: NEVER[field]}))) == [field]


def test_what_only_negatives_read_is_read_with_a_dense_term(tmp_path: Path) -> None:
    """log t − log θ is below 0 where the student is surer than the teacher."""
    for field, (value, others) in READ_WHERE.items():
        if "positive_only" in others:
            settings = {**others, field: value, "positive_only": "all"}
            assert "drops" in unread_settings(config_with("GRPO", tmp_path, settings))[field]
            settings["distillation_coefficient"] = 0.1
            assert field not in unread_settings(config_with("GRPO", tmp_path, settings))
    assert "delta" not in unread_settings(config_with("GRPO", tmp_path, {"delta": 1.1}))  # below the upper bound


def named(caught: Any, text: str) -> list[Any]:
    return [each for each in caught if text in str(each.message)]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence", "sampled_token"])
def test_each_is_named_once_where_the_user_stands(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Those of the configuration, and those that the engine which was chosen does not read."""
    settings = {
        **{"cache_implementation": "static", "vllm_server_port": 9},
        **{"vllm_model_impl": "nonsense", "vllm_gpu_memory_utilization": 0.9},
    }
    with pytest.warns(UserWarning, match="does nothing here") as caught:
        make_trainer(kind, pair, tmp_path, **settings)
    for name, value in settings.items():
        (warning,) = named(caught, f"`{name}` is")
        assert str(warning.message).startswith(f"`{name}` is {value!r} and does nothing here: it is read ")
        assert Path(warning.filename).name == "training.py", warning.filename


def test_a_plain_configuration_is_taken_without_a_word(pair: tuple[str, str], tmp_path: Path) -> None:
    for kind in KINDS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(kind, pair, tmp_path)
        assert not named(caught, "does nothing")
        assert not named(caught, "`beta`")


@pytest.mark.parametrize("kind", ["grpo", "rloo", "divergence"])
def test_a_mode_that_does_not_exist_is_refused(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"^Unknown value of `vllm_mode` 'colocated'\. .*Did you mean 'colocate'\?"):
        make_trainer(kind, pair, tmp_path, vllm_mode="colocated")
    with pytest.raises(ValueError, match=r"^`max_completion_length` is None; wanted a whole number"):
        make_trainer(kind, pair, tmp_path, max_completion_length=None)


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_refused_is_refused(pair: tuple[str, str], tmp_path: Path, field: str) -> None:
    kinds = [kind for kind in KINDS if field in KINDS[kind][1].__dataclass_fields__]
    assert kinds
    for kind in kinds:
        words = "continuous_batching" if field == "use_transformers_paged" else field
        with pytest.raises(
            ValueError, match=words.removeprefix("teacher_model_init_kw").removesuffix("args") or "rev"
        ):
            make_trainer(kind, pair, tmp_path, **{field: REFUSED[field]})


def test_the_teacher_of_the_configuration_is_the_generators(pair: tuple[str, str], tmp_path: Path) -> None:
    """The one that the divergence and the rollouts read; the loss of sampled tokens reads the rollouts alone."""
    make_trainer("divergence", pair, tmp_path, teacher_model_name_or_path=pair[0] + "/")
    make_trainer("divergence", pair, tmp_path, teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match=r"`teacher_model_name_or_path` is 'other' and the generator's `teacher`"):
        make_trainer("divergence", pair, tmp_path, teacher_model_name_or_path="other")
    for name, value in (("teacher_model_name_or_path", pair[0]), ("teacher_model_init_kwargs", {"dtype": "auto"})):
        with pytest.raises(ValueError, match=rf"`{name}` is .*, and `loss='sampled_token'` does not read it"):
            make_trainer("sampled_token", pair, tmp_path, **{name: value})


def test_a_penalty_on_the_mixtures_tokens_is_named(pair: tuple[str, str], tmp_path: Path) -> None:
    """TRL's RLOO has one by default; ours has none."""
    for config in (None, trl.RLOOConfig):
        with pytest.warns(UserWarning, match=r"`beta` is 0\.05: RLOO takes .*Leave it at 0") as caught:
            make_trainer("rloo", pair, tmp_path, config=config, beta=0.05)
        (warning,) = named(caught, "`beta`")
        assert Path(warning.filename).name == "training.py"
    assert optimal_sampling_trl.RLOOConfig("x", use_cpu=True, bf16=False).beta == 0


@pytest.mark.parametrize("kind", ["grpo", "raft"])
def test_settings_of_the_mixture_are_named_where_the_student_samples_all(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    generator = {"mixture": Mixture(alpha_min=0.3), "schedule": 0.5}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for fraction in (1.0, 0.5):
            settings = generator | {"theta_fraction": fraction}
            correction = {"correction": "token_truncate"} if kind == "grpo" else {}
            make_trainer(kind, pair, tmp_path / str(fraction), generator=settings, **correction)
    named = [str(one.message) for one in caught if "and the student samples all" in str(one.message)]
    assert [words.split("`")[1] for words in named] == ["mixture", "schedule", *correction]  # of the first alone
