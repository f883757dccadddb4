"""Names of weights in memory against the names in the files that transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, T5Config

from helpers.models import FAMILIES, WRAPPERS, make_model
from optimal_sampling_trl.pairing import Source
from optimal_sampling_trl.pairing.names import WeightNames, names_of


def files_of(folder: str) -> dict[str, torch.Tensor]:
    return {name: weight for path in Path(folder).glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WRAPPERS])
def test_weights_in_memory_come_under_the_names_and_with_the_values_of_the_files(
    tmp_path: Path, family: str, tied: bool
) -> None:
    folder = make_model(tmp_path, family, 1, tied=tied)
    names = Source(folder, "student").weight_names
    assert names is not None
    files = {name: weight for name, weight in files_of(folder).items() if not names.is_buffer(name)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = dict(names.on_disk(model.named_parameters(), files))
    assert found.keys() == files.keys()
    assert all(torch.equal(found[name], files[name]) for name in files)
    assert names.parameters_on_disk(files) == files.keys()
    assert names.shapes == {name: weight.shape for name, weight in model.named_parameters()}
    is_tied = tied and family != "nemotron_h"  # transformers ties none of its weights
    assert names.ties == ({"lm_head.weight": "model.embed_tokens.weight"} if is_tied else {})


def test_what_is_on_disk_already_and_what_is_unknown_pass_as_they_are(tmp_path: Path) -> None:
    files = files_of(make_model(tmp_path, "qwen3_moe", 1))
    names = Source(str(tmp_path), "student").weight_names
    assert names is not None
    given = [*list(files.items())[:3], ("another.weight", torch.zeros(2))]
    assert [name for name, _ in names.on_disk(given, files)] == [name for name, _ in given]


def test_files_may_lack_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    """As those of GPT-2 on the Hub."""
    make_model(tmp_path, "llama", 1)
    names = Source(str(tmp_path), "student").weight_names
    assert names is not None
    files = {name.removeprefix("model.") for name in files_of(str(tmp_path))}
    found = {name for name, _ in names.on_disk([(name, torch.zeros(1)) for name in names.shapes], files)}
    assert found == files


def test_a_buffer_is_told_from_a_parameter() -> None:
    """DeepSeek-V3 keeps the correction of its router's scores in a buffer, which its files hold."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    names = WeightNames(DeepseekV3Config(**sizes, n_routed_experts=8, n_group=2, topk_group=1))
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert names.is_buffer(name)
    assert name not in names.parameters_on_disk({name, "lm_head.weight"})
    assert not names.is_buffer("lm_head.weight")


def test_a_model_that_transformers_does_not_know_has_no_names() -> None:
    assert names_of(T5Config()) is None
