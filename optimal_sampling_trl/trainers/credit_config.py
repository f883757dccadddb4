"""Credit of the tokens of a completion: the settings by which they share its advantage."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..options import check_choice

CREDITS = ("completion", "anchored", "routed")


@dataclass
class CreditConfig:
    """Credit of single tokens from the records, beside a dense term.

    Raises:
        ValueError: on an unknown credit, or one that needs the dense term where there is none.
    """

    credit: str = field(
        default="completion",
        metadata={
            "help": "How tokens share their completion's advantage: all of it ('completion', the default, as in TRL), "
            "less where the student is surer than the teacher ('anchored', RLAD, arXiv:2602.22495), or 'routed' "
            "(SRPO, arXiv:2604.02288): completions without a reward above 0 learn from the dense term alone, the "
            "others from the reward alone.",
            "choices": CREDITS,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_choice("credit", self.credit, CREDITS)
        if self.credit == "routed" and self.dense_coefficient == 0:  # type: ignore[attr-defined]
            raise ValueError(
                "`credit` is 'routed' and `dense_coefficient` 0, so that wrong completions would teach nothing; "
                "wanted a coefficient above 0. Set `dense_coefficient=1.0`, or leave `credit` at 'completion'."
            )
