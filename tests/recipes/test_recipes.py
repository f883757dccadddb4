"""Holds for every recipe: it is run by a test of its name, and its head and its README say how to run it.

A script `engine.py` of a folder is run by `test_engine` of that folder's file in `TESTED_IN`.
"""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from helpers.paths import RECIPES
from helpers.recipes import FOUND, HOME, TRAINING, need_vllm, run, stated_dependencies
from optimal_sampling_trl.cli.main import commands
from optimal_sampling_trl.trainers.arguments import GeneratorArguments

TESTED_IN = {".": "test_starters.py", "benchmarks": "test_benchmarks.py", "studies": "test_studies.py"}
"""The file of tests that runs a folder's scripts."""
MODULES = {
    "benchmarks/random_pair.py": "the benchmarks import it: flags, random models, stopwatch",
    "benchmarks/decoding.py": "scaling.py imports it: a step of decoding, fitted to measured ones",
    "benchmarks/updating.py": "scaling.py imports it: an update, fitted to measured ones, and a step's memory",
    "benchmarks/training_arms.py": "training.py imports it: the trainers that are compared",
    "benchmarks/training_watch.py": "training.py imports it: times a step's parts, and its memory",
    "benchmarks/training_profile.py": "training.py imports it: where the time of an update goes",
    "benchmarks/speculation_engines.py": "speculation.py imports it: the engines; test_benchmarks.py",
    "studies/stack.py": "horizon_train.py imports it: many students as one batch; test_stack.py",
    "studies/digit_tasks.py": "ladder.py imports it: what is asked; test_past_the_teacher.py",
    "studies/stack_graph.py": "horizon_train.py imports it: a GPU's launches as one; test_past_the_teacher.py",
    "studies/stack_losses.py": "horizon_train.py imports it: what students learn from; test_stack.py",
    "studies/stack_credit.py": "stack_losses.py imports it: credit of single tokens; test_stack_credit.py",
    "studies/stack_measure.py": "horizon_train.py imports it: how good students are; test_stack.py",
    "studies/stacks.py": "horizon.py imports it: which runs are missing; test_past_the_teacher.py",
    "studies/stage.py": "horizon_train.py imports it: arms and their phases; test_past_the_teacher.py",
    "studies/past_the_teacher_arms.py": "past_the_teacher.py imports it: what is compared, and why",
    "studies/past_the_teacher_around.py": "past_the_teacher_tables.py imports it: other teachers and verifiers",
    "studies/past_the_teacher_cells.py": "past_the_teacher_tables.py imports it: what a cell says",
    "studies/past_the_teacher_effects.py": "past_the_teacher_report.py imports it: main effects; test_studies.py",
    "studies/past_the_teacher_interactions.py": "past_the_teacher_tables.py imports it; test_studies.py",
    "studies/past_the_teacher_places.py": "past_the_teacher_tables.py imports it: where two ladders were run",
    "studies/past_the_teacher_rates.py": "past_the_teacher_tables.py imports it: rates beyond an edge, equal seconds",
    "studies/past_the_teacher_report.py": "past_the_teacher.py imports it: its tables and its picture",
    "studies/presets_arms.py": "presets.py imports it: what is compared, and where",
    "studies/presets_report.py": "presets.py imports it: its tables and its picture",
    "studies/real_tasks.py": "real_text.py imports it: its questions and verifier; test_real_text.py",
    "studies/real_models.py": "real_text.py imports it: its students and teachers; test_real_text.py",
    "studies/real_arms.py": "real_text.py imports it: what is compared, and its trainers",
    "studies/real_seconds.py": "real_tables.py imports it: seconds of the arms; test_real_text.py",
    "studies/real_exam.py": "real_text.py imports it: its measurements",
    "studies/real_run.py": "real_text.py and informed.py import it: a run, the jobs of a machine, the flags",
    "studies/real_text_report.py": "real_text.py imports it: its tables and plots",
    "studies/real_cells.py": "real_tables.py imports it: what a cell says; test_real_text.py",
    "studies/real_draws.py": "real_tables.py imports it: the teachers' shares; test_real_text.py",
    "studies/real_places.py": "real_tables.py imports it: the table of the README",
    "studies/real_rates.py": "real_tables.py imports it: the rates of each arm; test_real_text.py",
    "studies/informed_arms.py": "informed.py imports it: its arms, hints and measurements; test_real_text.py",
    "studies/horizon_arms.py": "horizon.py imports it: what is compared",
    "studies/horizon_train.py": "horizon.py imports it: one stack of runs",
    "studies/horizon_report.py": "horizon.py imports it: its tables and plots",
    "studies/questions.py": "recover.py imports it: its data and reward",
    "studies/exam.py": "recover.py imports it: its measurements",
    "studies/runs.py": "the studies import it: test_studies.py",
}
"""Files that are no scripts, with the reason."""
SCRIPTS = [name for name in FOUND if name not in MODULES]


def test_every_script_is_run() -> None:
    for name in SCRIPTS:
        file = Path(__file__).with_name(TESTED_IN[str(Path(name).parent)])
        test = f"def test_{Path(name).stem}("
        assert test in file.read_text(), f"Write `{test}...)` in {file}, or say in MODULES why {name} is no script"


def test_every_module_is_one() -> None:
    gone = sorted(set(MODULES) - set(FOUND))
    assert not gone, f"{gone} are not in {RECIPES} any more: drop their entries of MODULES"
    for name in MODULES:
        assert "__main__" not in (RECIPES / name).read_text(), f"{name} is a script: write a test that runs it"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_readme_says_its_command(script: str) -> None:
    """The README of its folder, in the table of scripts; the demo's command is make's."""
    (row,) = re.findall(
        rf"^\| `{Path(script).name}` \| (.*)$", (RECIPES / script).with_name("README.md").read_text(), re.M
    )
    assert f"recipes/{script}" in row or row.startswith("`make demo`"), row


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported what each script alone imports for seconds; four change their process."""
    if script in ("benchmarks/engine.py", "benchmarks/speculation.py"):
        need_vllm()
    if script == "benchmarks/triton_kernels.py" and find_spec("triton") is None:
        pytest.skip("no build of Triton for this system")
    own_process = ("engine", "speculation", "training", "triton_kernels")
    if script in [f"benchmarks/{name}.py" for name in own_process]:
        assert "usage: " in run(script, "--help")
        return
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((RECIPES / script).parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / script), run_name="__main__")
    assert not ended.value.code
    assert "usage: " in capsys.readouterr().out


def test_every_field_of_the_flags_has_a_help() -> None:
    """TRL's parser shows it; an argument without one says nothing but its name."""
    from optimal_sampling_trl import trainers

    modules = [trainers, *(import_module(Path(name).stem) for name in FOUND)]
    modules += [import_module(f"optimal_sampling_trl.cli.commands.{name}") for name in commands()]
    kinds = [kind for module in modules for kind in vars(module).values() if is_dataclass(kind)]
    parsed = {kind for kind in kinds if any("help" in each.metadata for each in fields(kind))}
    assert {"SampleArguments", "RoleArguments", "GeneratorArguments", "GRPOConfig"} <= {
        kind.__name__ for kind in parsed
    }
    for kind in parsed:
        inherited = {each.name for base in kind.__mro__[1:] if is_dataclass(base) for each in fields(base)}
        for each in fields(kind):
            assert each.name in inherited or each.metadata.get("help"), f"{kind.__name__}.{each.name}"


@pytest.mark.parametrize("given", ["{max_num_seqs: 8, dtype: float32}", '\'{"max_num_seqs": 8, "dtype": "float32"}\''])
def test_engine_arguments_in_yaml(tmp_path: Path, given: str) -> None:
    """As a mapping, which is what YAML is for, or as the text that the flag takes."""
    config = tmp_path / "config.yaml"
    config.write_text(f"teacher: large\nengine_arguments: {given}\n")
    (arguments,) = TrlParser((GeneratorArguments,)).parse_args_and_config(["--config", str(config)])
    assert arguments.generator().engine_arguments == {"max_num_seqs": 8, "dtype": "float32"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_lines_say_how_to_run_it(script: str) -> None:
    text = (RECIPES / script).read_text()
    description = text.split('"""')[1]
    assert re.search(rf"^    .*(python|accelerate launch) recipes/{script}", description, re.MULTILINE)
    most = 120 if script.removesuffix(".py") in TRAINING else 205
    assert len(text.splitlines()) <= most


OWN = {
    "accelerate",
    "datasets",
    "jaxtyping",
    "optimal_sampling_trl",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "trl",
}
"""Packages that come with this one: its dependencies, and what those need themselves."""
NEEDED_FOR = {
    "optimal_sampling_trl.plots": "optimal-sampling-trl[plots]",
    "load_options": "peft",
    "accuracy_reward": "math-verify",
    "gguf_file=": "gguf",
    "from vllm": "optimal-sampling-trl[vllm]",
    "import vllm": "optimal-sampling-trl[vllm]",
    "import triton": "optimal-sampling-trl[vllm]",
}
"""Signs in a script's text of a package that it needs beyond."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_dependencies_at_its_head_are_complete(script: str) -> None:
    """PEP 723: what the script and the recipes that it imports name is installed by its header alone."""
    text = (RECIPES / script).read_text()
    stated = stated_dependencies(text)
    assert stated, f"{script} does not open with its dependencies"
    names = {re.split(r"[<>=]", each)[0] for each in stated}
    read, todo = {}, [script]
    while todo:
        file = todo.pop()
        read[file] = code = (RECIPES / file).read_text()
        imports = set(re.findall(r"^ *(?:from|import) (\w+)", code.split('"""', 2)[2], re.MULTILINE))
        todo += [HOME[name] for name in imports if HOME.get(name, file) not in (file, *read)]
        others = imports - set(HOME) - set(sys.stdlib_module_names) - OWN
        assert others <= {"triton", "vllm", *names, *(name.replace("-", "_") for name in names)}, (
            f"{file} imports {others}"
        )
    every = "\n".join(read.values())
    for sign, package in NEEDED_FOR.items():
        if sign in text:
            assert package in names, f"{script} shows {sign!r} and does not name {package}"
    assert "optimal-sampling-trl" in {name.split("[")[0] for name in names} or "optimal_sampling_trl" not in every


@pytest.mark.parametrize("name", TRAINING)
def test_the_yaml_names_what_pair_writes(name: str) -> None:
    """The documented command, from the repository's root after `pair.py --folder output/pair`."""
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    description = (RECIPES / f"{name}.py").read_text().split('"""')[1]
    assert "python recipes/pair.py --folder output/pair\n" in description
    assert f"accelerate launch recipes/{name}.py --config recipes/{name}.yaml\n" in description
    assert settings["model_name_or_path"] == "output/pair/student"
    assert settings["teacher"] == "output/pair/teacher"
    assert settings["dataset_name"] == "output/pair/data"


# accelerate's settings for several GPUs, which the tests can only read.


@pytest.mark.parametrize(
    ("name", "trls", "kind"),
    [("ddp", "multi_gpu", "MULTI_GPU"), ("fsdp2", "fsdp2", "FSDP"), ("deepspeed_zero3", "zero3", "DEEPSPEED")],
)
def test_accelerate_reads_its_settings(name: str, trls: str, kind: str) -> None:
    import trl
    from accelerate.commands.config.config_args import load_config_from_file

    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == kind
    assert (config.fsdp_config.get("fsdp_version"), config.deepspeed_config.get("zero_stage")) == {
        "ddp": (None, None),
        "fsdp2": (2, None),
        "deepspeed_zero3": (None, 3),
    }[name]
    assert config == load_config_from_file(
        str(Path(trl.__file__).parent / "accelerate_configs" / f"{trls}.yaml")
    )  # nothing differs from what TRL's users know
    head = path.read_text().split("compute_environment")[0]
    assert f"--config_file recipes/accelerate/{name}.yaml" in head
    assert "four H200s" in head, "the head says where it was seen to run"


def test_the_accelerate_folder_holds_no_other_file() -> None:
    names = {path.name for path in (RECIPES / "accelerate").iterdir()}
    assert names == {"ddp.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"}
