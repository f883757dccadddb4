"""What is pushed into an engine of a trained student: the model that the trainer's forward pass is, or a refusal.

Here the weights go into a second model of the student's folder, which has to say what the trained one says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import create_model_from_path

pytest.importorskip("peft")

from helpers.children import run_two_ranks
from helpers.models import WRAPPERS, make_model
from helpers.students import (
    TIED,
    UNTIED,
    Make,
    load,
    lora,
    stirred,
)
from optimal_sampling_trl.pairing import Source
from optimal_sampling_trl.trainers.engines.student import StudentWeights
from optimal_sampling_trl.trainers.engines.student_checks import check_student

IDS = torch.arange(27).reshape(3, 9) * 7
EXPERTS: dict[str, Make] = {
    "experts": lambda model: model,
    "lora beside experts": lora(),
    "lora on experts": lora(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "lora on the router": lora(target_modules=["gate"]),
}
PUSHED = [
    *((name, make, "llama", tied) for name, make in TIED.items() for tied in (False, True)),
    *((name, make, "llama", False) for name, make in UNTIED.items()),
    *((name, make, "qwen3_moe", False) for name, make in EXPERTS.items()),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], str]:
    """The folder of a student; 288 tokens, which vLLM pads."""
    root, made = tmp_path_factory.mktemp("students"), {}

    def folder(family: str, tied: bool) -> str:
        if (family, tied) not in made:
            made[family, tied] = make_model(root / f"{family}-{tied}", family, 1, tied=tied)
        return made[family, tied]

    return folder


@torch.no_grad()
def log_probabilities(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "make", "family", "tied"),
    PUSHED,
    ids=lambda value: "" if callable(value) else str(value),  # a function's name differs between processes
)
def test_the_weights_are_those_of_the_forward_pass(
    folders: Callable[[str, bool], str], name: str, make: Make, family: str, tied: bool
) -> None:
    """And the trained model is left bit by bit as it was."""
    source = Source(folders(family, tied), "student")
    model = make(load(source.name))
    check_student(model, source, StudentWeights(model))
    wanted = log_probabilities(stirred(model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert source.weight_names is not None
    pushed = {name: weight.clone() for name, weight in StudentWeights(model) if name not in source.weight_names.ties}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert pushed.keys() == source.weight_names.shapes.keys()
    second = load(source.name)
    assert (wanted - log_probabilities(second)).abs().max() > 0.01, "nothing was trained"
    second.load_state_dict(pushed, strict=False)
    second.tie_weights()
    assert (wanted - log_probabilities(second)).abs().max() < 5e-5


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_is_taken_as_trl_loads_it_and_as_its_causal_model(tmp_path: Path, family: str) -> None:
    """TRL trains it with its towers; transformers' causal model of Qwen3.5 is the language model alone."""
    source = Source(make_model(tmp_path, family, 1), "student")
    adapt = lora(target_modules=r".*language_model.*\.(q|down)_proj")
    whole = adapt(create_model_from_path(source.name, dtype=torch.float32))
    check_student(whole, source, StudentWeights(whole))
    if family.startswith("qwen3_5"):
        inside = AutoModelForCausalLM.from_pretrained(source.name)
        assert not any("visual" in name for name, _ in inside.named_parameters())
        check_student(inside, source, StudentWeights(inside))


SPLIT = {
    False: [name for name in (*TIED, *UNTIED) if not name.startswith(("compiled", "tied"))],
    True: ["full", "lora", "new tokens in both", "tied embedding as a whole"],
}
"""Students, untied and tied, that two processes split. Compiling comes after; torch refuses a tied adapter's shape."""


@pytest.mark.parametrize("by", ["fsdp2", "zero3"])
def test_a_student_that_two_processes_split_is_handed_out_whole(
    folders: Callable[[str, bool], str], tmp_path: Path, by: str
) -> None:
    """Each weight merged and brought together on every rank, and each rank's shard bit by bit as it was."""
    if by == "zero3":
        pytest.importorskip("deepspeed")
    students = [part for tied, names in SPLIT.items() for part in ("--of", folders("llama", tied), *names)]
    process = run_two_ranks("sharded_students.py", by, tmp_path, *students, DS_ACCELERATOR="cpu")
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads((tmp_path / "split.json").read_text())
    for differences, names in zip(found, SPLIT.values(), strict=True):
        assert differences.keys() == set(names)
        assert max(differences.values()) < 1e-6, differences


def test_what_rounds_is_restored(folders: Callable[[str, bool], str]) -> None:
    """In bfloat16 adding and subtracting an adapter does not give back what was there, and a push comes every step."""
    model = stirred(lora()(load(folders("llama", False)).to(torch.bfloat16)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        for _ in StudentWeights(model):
            pass
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    weights = iter(StudentWeights(model))  # one that breaks off leaves no layer merged
    for name, _ in weights:
        if "q_proj" in name:
            break
    weights.close()  # type: ignore[attr-defined]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
