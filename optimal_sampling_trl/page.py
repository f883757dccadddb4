"""Rollouts as one HTML file: every token coloured by α, no network, no dependency.

The page is `page.html` beside this module with its gaps filled: title, data, hash of the script. What a model wrote
never becomes markup: the data is JSON with every `<` escaped, the script builds the page through `textContent` alone,
and a content security policy admits that one script, by its hash: markup that slipped through would still not run.
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
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .rollouts.rollout import RECORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .rollouts.rollout import Rollout

DIGITS = 4
LARGEST_PAGE = 400_000_000
"""Characters of data that a page may hold: browsers refuse strings from about 500 million on."""
REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""
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
    """Writes `rollouts` as a self-contained HTML page and returns its path.

    The page filters by reward, mean α and text, sorts, and shows 50 rollouts at a time; a token shows its records on
    hover and on keyboard focus.

    Args:
        path (`str` or `os.PathLike`):
            File to write. Its folder is made; an existing file is replaced at once: nobody reads half a page.
        rollouts (`Sequence[Rollout]`):
            N rollouts, each with its T tokens and four records `(T,)`. NaN is shown as absent, infinities as such.
        tokenizer (`PreTrainedTokenizerBase`):
            Turns ids into text; that of the teacher or of θ, since they share it.
        rewards (`Iterable[float | None]`, *optional*):
            N rewards; `None` or NaN is shown as absent.
        title (`str`, *optional*, defaults to `"Rollouts"`):
            Heading of the page.
        steps (`Iterable[int]`, *optional*):
            N training steps; with them the page draws the mean α of each step's tokens over training.

    Raises:
        ValueError: No rollouts; rewards, steps or a record of another length; more data than a browser can load.

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


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces the file at `path` by `content` in one step; makes its folder. A failure leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened by hand, not through `tempfile`, whose files only their owner may read.
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fill_template(title: str, data: str) -> str:
    """The page's text. `data` is JSON without `<`; `title` is escaped here."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One split, not successive replacements: a title or a completion may itself contain the name of a gap.
    before, between, after_title, after_data = re.split("__SCRIPT_HASH__|__TITLE__|__DATA__", template)
    return "".join([before, f"sha256-{digest}", between, html.escape(title), after_title, data, after_data])


def _one_per_rollout(name: str, values: Iterable[Any] | None, count: int) -> list[Any]:
    """`values` as a list of `count` entries, all `None` where there are none."""
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
    """What the script reads. Prompts, mixtures and token texts stand once, and rollouts point at them."""
    pieces = _Table(lambda token: _piece(tokenizer, token))
    prompts = _Table(lambda ids: _decode(tokenizer, list(ids)))
    mixtures = _Table(dict)
    rows = []
    for index, (rollout, reward, step) in enumerate(zip(rollouts, rewards, steps, strict=True)):
        ids = [int(token) for token in rollout.completion_ids]
        texts = [pieces[token] for token in ids]
        records = _records(rollout, index)  # (4, T)
        row = {
            "ids": ids,
            **{name: _rounded(record) for name, record in zip(RECORDS, records, strict=True)},
            "mean": _rounded(records[RECORDS.index("alpha")].nanmean()[None])[0],
            "reward": _rounded(torch.tensor([math.nan if reward is None else float(reward)]).double())[0],
            "step": None if step is None else int(step),
            "prompt": prompts.index(tuple(rollout.prompt_ids)),
            "theta_prompt": prompts.index(tuple(rollout.theta_prompt_ids)),
            "mixture": mixtures.index(tuple(rollout.mixture.to_dict().items())),
            "temperature": float(rollout.temperature),
            "finish": rollout.finish_reason,
        }
        joined = _joined_characters(tokenizer, ids, texts)
        rows.append({**row, "joined": joined} if joined else row)
    return {
        "pieces": {str(token): text for token, text in pieces.items()},
        "prompts": list(prompts.values()),
        "mixtures": list(mixtures.values()),
        "rollouts": rows,
    }


class _Table(dict[Any, Any]):
    """A dictionary that computes a missing value, and knows the place of each key."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        super().__init__()
        self._compute = compute
        self._places: dict[Any, int] = {}

    def __missing__(self, key: Any) -> Any:
        self._places[key] = len(self)
        self[key] = self._compute(key)
        return self[key]

    def index(self, key: Any) -> int:
        """Place of `key` in the order of `values()`; adds it first where it is new."""
        self[key]  # computes what is missing
        return self._places[key]


def _records(rollout: Rollout, index: int) -> torch.Tensor:
    """The four records of a rollout as one float64 tensor `(4, T)`; a record that is `None` is NaN throughout.

    Raises:
        ValueError: A record does not have one entry per token.
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


def _rounded(values: torch.Tensor) -> list[float | str | None]:
    """Float64 `(T,)` for JSON: four decimals, NaN as `None`, infinities as `"inf"` and `"-inf"`, which JSON lacks."""
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
