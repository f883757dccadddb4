"""The plugin that each of vLLM's processes loads: names only, so that loading it can neither fail nor cost time."""

from __future__ import annotations

import logging
from importlib.util import find_spec

ARCHITECTURE = "OptimalSamplingForCausalLM"
"""The architecture under which vLLM knows the fused model."""
HYBRID = "OptimalSamplingHybridForCausalLM"
"""The same for a pair with linear attention."""
TRANSFER = "optimal_sampling"
"""The name under which vLLM knows the engine that a trainer's weights reach the student by."""
_HOMES = {
    ARCHITECTURE: f"{__package__}.worker.model",
    HYBRID: f"{__package__}.worker.hybrid",
    # The language models of Qwen3.5: vLLM 0.26 has their code and knows it under no name.
    **dict.fromkeys(("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), "vllm.model_executor.models.qwen3_5"),
}
"""The modules of what is registered, where vLLM does not have it under its name."""


def register() -> None:
    """Register the fused model and its weight transfer with vLLM, which calls this through its plugins' entry point.

    May be called any number of times. vLLM does not catch what a plugin raises, and the plugin is loaded for every
    model that a user serves: so an unsuited version is logged here, and raised by `require` where it matters.
    """
    from . import versions

    reason = versions.unsupported()
    if reason:
        logging.getLogger(__name__).warning("optimal_sampling_trl: %s", reason)
        return
    from vllm import ModelRegistry

    from .blocks import private_blocks
    from .hooks import run_hooks_of_teachers
    from .speculation import draft_with_theta

    for architecture, home in _HOMES.items():
        if architecture not in ModelRegistry.get_supported_archs() and find_spec(home):
            ModelRegistry.register_model(architecture, f"{home}:{architecture}")
    for architecture in (ARCHITECTURE, HYBRID):
        run_hooks_of_teachers(architecture)
    private_blocks()
    draft_with_theta()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, f"{__package__}.worker.transfer", "ThetaNCCL")


def require() -> None:
    """Load vLLM's plugins, and see that ours registered its model.

    Raises:
        ImportError: where vLLM is missing, has an unsuited version, or was told not to load this plugin.
    """
    from . import versions

    reason = versions.unsupported()
    if reason:
        raise ImportError(reason)
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        raise ImportError(
            "vLLM did not load the plugin `optimal_sampling` of this package. Install the package (an entry point is "
            "read from its metadata), and where the variable VLLM_PLUGINS is set, add optimal_sampling to it."
        )
