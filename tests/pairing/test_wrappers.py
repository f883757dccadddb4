"""The language model inside of a multimodal one: its settings, and its weights under each of their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import KEPT, make_model
from optimal_sampling_trl.pairing import name_sources
from optimal_sampling_trl.pairing.names import model_class
from optimal_sampling_trl.pairing.wrappers import WRAPPERS, is_wrapper, language_model, text_name

TEXT_FAMILY = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "ministral3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3",
}


def names_in(folder: str) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if not name.endswith(KEPT)}  # noqa: SIM118


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_weights_are_those_of_the_text_family(family: str, tmp_path: Path) -> None:
    """In memory as a trainer pushes them, and in the files, which have old names for some."""
    folder = make_model(tmp_path / "wrapper", family, 0)
    text = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "text", TEXT_FAMILY[family], 0))
    wanted = {name: weight.shape for name, weight in text.named_parameters()}
    wrapper = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    assert {text_name(name): weight.shape for name, weight in wrapper.named_parameters() if text_name(name)} == wanted
    assert {text_name(name) for name in names_in(folder)} - {None} == names_in(text.name_or_path)
    assert {text_name(name) for name in wanted} == set(wanted)


@pytest.mark.parametrize("family", WRAPPERS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_settings_are_the_language_models(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "wrapper", family, 0, vocab_size=300, tied=tied)
    source, other = name_sources(folder, make_model(tmp_path / "text", "qwen3", 0), {})
    config = source.text_config
    assert config is not source.config
    assert is_wrapper(source.config)
    assert not is_wrapper(config)
    assert (config.vocab_size, config.tie_word_embeddings, config.name_or_path) == (300, tied, folder)
    assert config.architectures == [WRAPPERS[family]]
    assert source.config.get_text_config().architectures != config.architectures  # the model's own stay as they are
    assert other.text_config is other.config
    assert language_model(other.config) is other.config
