"""The data of the page: what its script reads of rollouts, as plain values for JSON.

Prompts, mixtures and texts of tokens stand once, and rollouts point at them. JSON has neither NaN nor infinities: NaN
becomes null, an infinity a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..rollouts.rollout import RECORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..rollouts.rollout import Rollout

DIGITS = 4
"""Decimals of the records on the page."""
LIKELY = 3
"""Tokens that each model would have preferred, where a rollout has dense records."""
REPLACEMENT = "\ufffd"
"""Text to which a tokenizer decodes an incomplete UTF-8 sequence."""
LONGEST_RUN = 16
"""Incomplete tokens that are tried together; a run that makes no text within it stays as the tokenizer shows it."""


def page_data(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    rewards: Sequence[float | None],
    advantages: Sequence[float | None],
    steps: Sequence[int | None],
) -> dict[str, Any]:
    """Collect what the script reads of N rollouts, in their order.

    Args:
        rewards, advantages, steps: N values each, None where there is none.

    Raises:
        ValueError: where a record does not have one entry for each token.
    """
    groups: dict[tuple[Any, ...], int] = {}  # the place of each prompt at a step, in order of the first completion
    prompts: dict[tuple[int, ...], int] = {}
    mixtures: dict[tuple[tuple[str, Any], ...], int] = {}
    rows, tokens = [], {}
    for index, rollout in enumerate(rollouts):
        prompt, theta_prompt = tuple(rollout.prompt_ids), tuple(rollout.theta_prompt_ids)
        row = _token_rows(rollout, index)
        tokens.update(dict.fromkeys(_ids_of(row)))
        rows.append(
            {
                **row,
                "half": "student" if rollout.mixture.is_theta_only else "mixture",
                "reward": _number(rewards[index]),
                "advantage": _number(advantages[index]),
                "step": steps[index],
                "prompt": prompts.setdefault(prompt, len(prompts)),
                "theta_prompt": prompts.setdefault(theta_prompt, len(prompts)),
                "group": groups.setdefault((prompt, theta_prompt, steps[index]), len(groups)),
                "mixture": mixtures.setdefault(tuple(rollout.mixture.to_dict().items()), len(mixtures)),
                "temperature": float(rollout.temperature),
                "finish": rollout.finish_reason,
            }
        )
    pieces = {token: _piece(tokenizer, token) for token in tokens}
    for row in rows:
        if joined := _joined_characters(tokenizer, row["ids"], [pieces[token] for token in row["ids"]]):
            row["joined"] = joined
    return {
        "pieces": {str(token): text for token, text in pieces.items()},
        "prompts": [_decode(tokenizer, list(ids)) for ids in prompts],
        "mixtures": [dict(mixture) for mixture in mixtures],
        "rollouts": rows,
    }


def _token_rows(rollout: Rollout, index: int) -> dict[str, Any]:
    """List what each of T tokens has: its id, its four records, and what the models would have preferred."""
    records = _records(rollout, index)
    row = {
        "ids": [int(token) for token in rollout.completion_ids],
        **{name: _rounded(record) for name, record in zip(RECORDS, records, strict=True)},
        "mean": _rounded(records[RECORDS.index("alpha")].nanmean()[None])[0],
        "acceptance": _rounded(_acceptance(rollout, records)[None])[0],
    }
    likely = _likely(rollout)
    return row if likely is None else {**row, "likely": likely}


def _ids_of(row: dict[str, Any]) -> Iterator[int]:
    """Yield the ids of all tokens that a row names."""
    yield from row["ids"]
    for model in row.get("likely", {}).values():
        yield from (token for token in model["ids"] if token is not None)


def _records(rollout: Rollout, index: int) -> Float[Tensor, "4 T"]:
    """Stack the four records of a rollout as float64; a record that is None is NaN throughout.

    Raises:
        ValueError: where a record does not have one entry for each token.
    """
    tokens = len(rollout.completion_ids)
    rows = []
    for name in RECORDS:
        values = getattr(rollout, name)
        row = torch.full((tokens,), math.nan) if values is None else torch.as_tensor(values)
        if row.shape != (tokens,):
            raise ValueError(
                f"rollout {index}: {name} has shape {tuple(row.shape)}, its completion {tokens} tokens; a record has "
                "one entry per generated token, EOS included: cut completion and records at the same place."
            )
        rows.append(row.detach().cpu().double())
    return torch.stack(rows)


def _likely(rollout: Rollout) -> dict[str, Any] | None:
    """List the most likely tokens of each model with their probabilities; None without dense records.

    Each list has the same number of entries for each of T tokens, one token after the other; a missing entry is None.
    """
    dense = rollout.dense
    if dense is None or 0 in dense.ids.shape:
        return None
    return {"theta": _best(dense.ids, dense.log_theta), "teacher": _best(dense.ids, dense.log_teacher)}


def _best(ids: Tensor, logs: Tensor) -> dict[str, Any]:
    """Choose the likeliest of (T, K) ids, in which a token may stand twice, by their log-probabilities (T, K)."""
    ids, order = ids.cpu().sort(dim=1, stable=True)
    logs = logs.double().cpu().gather(1, order)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    logs = logs.masked_fill(again | (ids < 0) | logs.isnan(), -torch.inf)
    best, places = logs.topk(min(LIKELY, logs.shape[1]), dim=1)
    known = best > -torch.inf
    tokens = ids.gather(1, places)
    return {
        "ids": [token if there else None for token, there in zip(tokens.flatten().tolist(), known.flatten().tolist())],
        "probabilities": _rounded(best.exp().flatten()),
    }


def _acceptance(rollout: Rollout, records: Float[Tensor, "4 T"]) -> Float[Tensor, ""]:
    """Average min(1, θ/q) over the tokens of a rollout (`metrics.ACCEPTANCE`); NaN where no token was drawn."""
    ratios = dict(zip(RECORDS, records, strict=True))
    accepted = (ratios["log_theta"] - ratios["log_q"]).clamp(max=0.0).exp().nanmean()
    return accepted if rollout.temperature > 0 else torch.full_like(accepted, math.nan)


def _number(value: float | None) -> float | str | None:
    return _rounded(torch.tensor([math.nan if value is None else float(value)]).double())[0]


def _rounded(values: Float[Tensor, " T"]) -> list[float | str | None]:
    """Round float64 values to four decimals for JSON, with NaN as None and infinities, which JSON lacks, as texts."""
    scale = 10.0**DIGITS
    rounded: list[float] = ((values * scale).round() / scale + 0.0).tolist()  # + 0.0 turns -0.0 into 0.0
    if bool(values.isfinite().all()):
        return list(rounded)
    return [None if math.isnan(v) else v if math.isfinite(v) else ("inf" if v > 0 else "-inf") for v in rounded]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text in the middle of a text; empty for an id without text, such as a padded row."""
    # SentencePiece drops the space of a first token: the second of two tells what the token adds.
    once, twice = _decode(tokenizer, [token]), _decode(tokenizer, [token, token])
    return twice[len(once) :] if twice.startswith(once) else once


def _joined_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: list[str]) -> dict[int, str]:
    """Return the texts, by position, of characters that span several tokens: the first token gets all of it."""
    joined: dict[int, str] = {}
    start = 0
    while start < len(ids):
        stop = start + 1
        # The shortest run of incomplete tokens that makes text; a byte-level merge may span two characters.
        while stop < min(start + LONGEST_RUN, len(ids)) and REPLACEMENT in texts[start] and REPLACEMENT in texts[stop]:
            stop += 1
            text = _decode(tokenizer, ids[start:stop])
            if text and REPLACEMENT not in text:
                joined[start] = text
                joined.update(dict.fromkeys(range(start + 1, stop), ""))
                start = stop - 1
                break
        start += 1
    return joined
