"""Rollouts as one HTML file: every token coloured by α, no network, no dependency.

The page is `page.html` beside this module with its gaps filled: title, data, hash of the script. A model's text never
becomes markup: the data is JSON with every `<` escaped, the script builds the page through `textContent` alone, and a
content security policy admits that one script, by its hash: markup that slipped through would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import write_atomically
from .rollouts.rollout import RECORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .rollouts.rollout import Rollout

DIGITS = 4
"""Decimals of the records on the page."""
LARGEST_PAGE = 400_000_000
"""Characters of data that a page may hold: browsers refuse strings from about 500 million on."""
REPLACEMENT = "\ufffd"
"""Text to which a tokenizer decodes an incomplete UTF-8 sequence."""
LONGEST_RUN = 16
"""Incomplete tokens that are tried together; a run that makes no text within it stays as the tokenizer shows it."""


def write_page(
    path: str | os.PathLike[str],
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    rewards: Iterable[float | None] | None = None,
    title: str = "Rollouts",
    steps: Iterable[int] | None = None,
) -> Path:
    """Write rollouts as a self-contained HTML page.

    The page filters by reward, mean α and text, sorts, and shows 50 rollouts at a time; a token shows its records on
    hover and on keyboard focus.

    Args:
        path: the file to write. Its folder is made; an existing file is replaced at once: nobody reads half a page.
        rollouts: N rollouts, each with its T tokens and four records (T,). NaN is shown as absent, infinities as such.
        tokenizer: turns ids into text; the teacher's or the student's, since they share it.
        rewards: N rewards; None or NaN is shown as absent.
        title: heading of the page.
        steps: N training steps; with them the page draws the mean α of each step's tokens over training.

    Returns:
        the path.

    Raises:
        ValueError: on no rollouts, on rewards, steps or a record of another length, and on more data than a browser
            can load.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            output = sampler.generate(["3 + 4 ="], n=4, max_tokens=8)
            write_page("output/rollouts.html", output.rollouts, sampler.backend.tokenizer, rewards=[0, 1, 0, 0])
        ```
    """
    if len(rollouts) == 0:
        raise ValueError("write_page got no rollouts; a page needs at least one: generate some before you write it.")
    reward_list = _one_per_rollout("rewards", rewards, len(rollouts))
    step_list = _one_per_rollout("steps", steps, len(rollouts))
    data = json.dumps(
        _page_data(rollouts, tokenizer, reward_list, step_list), separators=(",", ":"), allow_nan=False
    ).replace("<", "\\u003c")
    if len(data) > LARGEST_PAGE:
        raise ValueError(
            f"the data of {len(rollouts)} rollouts takes {len(data):,} characters, a page can hold {LARGEST_PAGE:,}; "
            "pass fewer rollouts, or several pages."
        )
    path = Path(path)
    write_atomically(path, _fill_template(title, data).encode())
    return path


def _fill_template(title: str, data: str) -> str:
    """Fill the gaps of the page. `data` is JSON without `<`; `title` is escaped here."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One split, not successive replacements: a title or a completion may itself contain the name of a gap.
    before, between, after_title, after_data = re.split("__SCRIPT_HASH__|__TITLE__|__DATA__", template)
    return "".join([before, f"sha256-{digest}", between, html.escape(title), after_title, data, after_data])


def _one_per_rollout(name: str, values: Iterable[Any] | None, count: int) -> list[Any]:
    """List `count` values, all None where `values` is.

    Raises:
        ValueError: where there are more or fewer.
    """
    if values is None:
        return [None] * count
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} entries for {count} rollouts; pass one per rollout, in the same order"
            + (" (None where there is no reward)." if name == "rewards" else ".")
        )
    return values


def _page_data(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, rewards: list[Any], steps: list[Any]
) -> dict[str, Any]:
    """Collect the data of the script. Prompts, mixtures and token texts stand once, and rollouts point at them."""
    tokens = dict.fromkeys(int(token) for rollout in rollouts for token in rollout.completion_ids)
    pieces = {token: _piece(tokenizer, token) for token in tokens}
    prompts: dict[tuple[int, ...], int] = {}  # the place of each in the page's list
    mixtures: dict[tuple[tuple[str, Any], ...], int] = {}
    rows = []
    for index, (rollout, reward, step) in enumerate(zip(rollouts, rewards, steps, strict=True)):
        ids = [int(token) for token in rollout.completion_ids]
        texts = [pieces[token] for token in ids]
        records = _records(rollout, index)  # (4, T)
        row = {
            "ids": ids,
            **{name: _rounded(record) for name, record in zip(RECORDS, records, strict=True)},
            "mean": _rounded(records[RECORDS.index("alpha")].nanmean()[None])[0],
            "acceptance": _rounded(_acceptance(rollout, records)[None])[0],
            "reward": _rounded(torch.tensor([math.nan if reward is None else float(reward)]).double())[0],
            "step": None if step is None else int(step),
            "prompt": prompts.setdefault(tuple(rollout.prompt_ids), len(prompts)),
            "theta_prompt": prompts.setdefault(tuple(rollout.theta_prompt_ids), len(prompts)),
            "mixture": mixtures.setdefault(tuple(rollout.mixture.to_dict().items()), len(mixtures)),
            "temperature": float(rollout.temperature),
            "finish": rollout.finish_reason,
        }
        joined = _joined_characters(tokenizer, ids, texts)
        rows.append({**row, "joined": joined} if joined else row)
    return {
        "pieces": {str(token): text for token, text in pieces.items()},
        "prompts": [_decode(tokenizer, list(ids)) for ids in prompts],
        "mixtures": [dict(mixture) for mixture in mixtures],
        "rollouts": rows,
    }


def _records(rollout: Rollout, index: int) -> torch.Tensor:
    """Stack the four records of a rollout as float64 (4, T); a record that is None is NaN throughout.

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


def _acceptance(rollout: Rollout, records: torch.Tensor) -> torch.Tensor:
    """Average min(1, θ/q) over the tokens of a rollout (`metrics.ACCEPTANCE`); NaN where no token was drawn."""
    ratios = dict(zip(RECORDS, records, strict=True))
    accepted = (ratios["log_theta"] - ratios["log_q"]).clamp(max=0.0).exp().nanmean()
    return accepted if rollout.temperature > 0 else torch.full_like(accepted, math.nan)


def _rounded(values: torch.Tensor) -> list[float | str | None]:
    """Round float64 (T,) to four decimals for JSON, with NaN as None and infinities, which JSON lacks, as texts."""
    scale = 10.0**DIGITS
    rounded: list[float] = ((values * scale).round() / scale + 0.0).tolist()  # + 0.0 turns -0.0 into 0.0
    if bool(values.isfinite().all()):
        return list(rounded)
    return [None if math.isnan(v) else v if math.isfinite(v) else ("inf" if v > 0 else "-inf") for v in rounded]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of a token in the middle of a text; empty for an id without text, such as a padded vocabulary row."""
    # SentencePiece drops the space of a first token: the second of two tells what the token adds.
    once, twice = _decode(tokenizer, [token]), _decode(tokenizer, [token, token])
    return twice[len(once) :] if twice.startswith(once) else once


def _joined_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int], texts: list[str]) -> dict[int, str]:
    """Texts by position where a character spans several tokens: the first token gets it, the others the empty text."""
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
