"""vLLM's scheduler, which chooses before each step how many tokens the student drafts after it."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from ..draft_counts import DraftCounts, size_of
from ..pair_settings import settings_of
from .submodels import theta_model_config


class DraftScheduler(AsyncScheduler):
    """Schedules as vLLM does, with as many drafts as pay by the batch and by the drafts that were kept."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        teacher: Any = vllm_config.model_config
        theta = theta_model_config(teacher, settings_of(vllm_config).theta)
        width = teacher.dtype.itemsize
        table = vllm_config.speculative_config.num_speculative_tokens_per_batch_size
        counts = tuple(sorted(entry[-1] for entry in table))
        self.draft_counts = DraftCounts(
            counts, size_of(teacher.hf_text_config, width), size_of(theta.hf_text_config, width)
        )

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Take a request. One that finds the engine idle has the drafts that it would have in a new engine."""
        if not self.requests:
            self.draft_counts.forget()
        super().add_request(request, *args, **kwargs)

    def make_spec_decoding_stats(
        self, spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Note how many drafts of a request were kept: vLLM's hook where it counts them itself."""
        self.draft_counts.see(num_draft_tokens, num_accepted_tokens)
        seen = (spec_decoding_stats, num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(*seen, *args, **kwargs)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Say how many tokens are drafted after this step, and verified in the next: vLLM's hook on a planned step."""
        if scheduler_output.num_scheduled_tokens:
            batch = len(scheduler_output.num_scheduled_tokens)
            scheduler_output.num_spec_tokens_to_schedule = self.draft_counts.choose(batch)
        super()._update_after_schedule(scheduler_output)
