"""The engines that sample: each turns requests into rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..request import Request
    from ..rollout import Rollout


class Backend(Protocol):
    """What the front door and the trainers ask of an engine."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout for each request, in their order."""

    def load_theta(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights in place; refuses a set that is not whole."""

    def sleep(self) -> None:
        """Free what memory the engine can until `wake_up`; the teacher is kept."""

    def wake_up(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """Free the engine. Doing so twice is fine."""
