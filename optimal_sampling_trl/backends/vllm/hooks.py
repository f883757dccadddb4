"""vLLM's settings that depend on an architecture, for an engine whose architecture is the fused model's."""

from __future__ import annotations

from typing import Any


class TeacherHooks:
    """Hooks of the fused model's architecture, which run those of the teacher's own."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Adjust a model's configuration: vLLM's hook while it is made."""
        read_positions_of_text(model_config)
        for hooks in _hooks_of(model_config):
            hooks.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Adjust an engine's configuration: vLLM's hook while it is made."""
        for hooks in _hooks_of(vllm_config.model_config):
            hooks.verify_and_update_config(vllm_config)


def _hooks_of(model_config: Any) -> list[Any]:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    found = [MODELS_CONFIG_MAP.get(name) for name in own_architectures(model_config)]
    return [hooks for hooks in found if hooks not in (None, TeacherHooks)]


def read_positions_of_text(model_config: Any) -> None:
    """Let the engine count positions as in text where its model has three for each token of an image.

    Symptom: an engine on a vision-language teacher asks the fused model for positions of images.
    Cause: the settings of rotary embeddings have a section for each kind of position, by which vLLM knows such models.
    Safe: all positions of a token of text are equal, so that the angles are those without sections.
    Upstream: none; vLLM serves these models with their images.
    Delete when: the fused model takes images.
    """
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    for section in ("mrope_section", "mrope_interleaved"):
        rope.pop(section, None)


def own_architectures(model_config: Any) -> list[str]:
    """Return the architectures in the teacher's checkpoint; the engine's configuration names the fused model."""
    from vllm.transformers_utils.config import get_config

    config = model_config
    on_disk = get_config(config.model, config.trust_remote_code, revision=config.revision, token=config.hf_token)
    return list(on_disk.architectures or [])


def run_hooks_of_teachers(architecture: str) -> None:
    """Let vLLM's hooks of an architecture run for the teacher. May be called any number of times.

    Symptom: a teacher lacks what vLLM sets for its architecture, such as the name of gpt-oss's MXFP4.
    Cause: vLLM looks the hooks up by the engine's architecture, which is the fused model's.
    Safe: the fused model's entry runs the teacher's; the student's configuration finds its own.
    Upstream: none; vLLM knows of one model in an engine.
    Delete when: vLLM asks a model's class for its hooks.

    Args:
        architecture: the fused model's.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    entries: dict[str, Any] = MODELS_CONFIG_MAP
    entries.setdefault(architecture, TeacherHooks)
