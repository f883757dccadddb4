"""Settings of a pair that vLLM's processes are told, in the engine's `additional_config`.

The launch (`launch.py`) writes them, and every process of the engine reads them. A server tells them to trainers as
well, in its `/server_info` (`server/messages.py`). This module imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ...pairing import Ending, Pair

KEY = "optimal_sampling"
"""The key of `additional_config` that holds the settings."""


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Settings of the pair that an engine serves, beyond those that vLLM has a name for.

    Args:
        theta: the student's folder; the teacher is the engine's own model.
        ending: where completions end.
        vocabulary: the number of tokens that both models score.
        two_prompts: whether the engine takes another prompt for the student than for the teacher.
        one_model: whether the teacher is the student itself.
        has_one_table: whether all layers of both models share one table of blocks.
        role: the model that the configuration is for, `"teacher"` or `"theta"`. It is a part of the key of compiled
            code, which the names of the layers are not.
    """

    theta: str
    ending: Ending
    vocabulary: int
    two_prompts: bool
    one_model: bool
    has_one_table: bool
    role: str = "teacher"

    @classmethod
    def of(cls, pair: Pair, **further: Any) -> Self:
        """Return the settings of a pair.

        Args:
            pair: what the engine is built on.
            **further: the fields that a subclass adds.
        """
        return cls(
            theta=pair.theta,
            ending=pair.ending,
            vocabulary=pair.vocabulary,
            two_prompts=pair.two_prompts,
            one_model=pair.one_model,
            # Windows of one length share a table of blocks with layers that read all; others need one each, and so do
            # layers that read another layer's cache, for which vLLM finds no place in a common table, and layers with
            # states.
            has_one_table=len(pair.windows) < 2 and not pair.shares_caches and not pair.has_states,
            **further,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, of values that JSON has."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings that `to_dict` wrote, maybe in another process and by way of JSON.

        Raises:
            ValueError: where another build wrote them, naming what is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        for names, words in ((known - given.keys(), "does not tell"), (given.keys() - known, "also tells")):
            if names:
                listed = ", ".join(sorted(names))
                raise ValueError(f"it runs another build of this package, which {words} its {listed}.")
        ending = {name: tuple(ids) for name, ids in given["ending"].items()}
        return cls(**{**given, "ending": Ending(**ending)})


@dataclass(frozen=True, kw_only=True)
class ServerSettings(PairSettings):
    """Settings of the pair that a server serves: those of `PairSettings`, and what it tells trainers beyond them.

    Args:
        version: this package's.
        tokens: `token_digest` of the tokenizer.
        engine_vocabulary: the number of tokens that the teacher scores.
        template: `template_digest` of the teacher's own tokenizer; None where it has no chat template.
        teacher_tokenizer: the chat template and special tokens of the teacher's tokenizer; None where it has the
            pair's.
        teacher_digest: `checkpoint_digest` of the teacher.
    """

    version: str
    tokens: str
    engine_vocabulary: int
    template: str | None
    teacher_tokenizer: dict[str, Any] | None
    teacher_digest: str | None


def settings_of(vllm_config: Any) -> PairSettings:
    """Return the settings in an engine's configuration, whether or not it is a server's."""
    given = vllm_config.additional_config[KEY]
    return (ServerSettings if "version" in given else PairSettings).from_dict(given)
