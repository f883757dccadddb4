"""Rollouts as one HTML file: every token coloured by a record, no network, no dependency.

The page is `viewer/page.html` with its gaps filled: title, style, data, script and the script's hash. A model's text
never becomes markup: the data is JSON with every `<` escaped, the script builds the page through `textContent` alone,
and a content security policy admits that one script, by its hash: markup that slipped through would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically
from .viewer.data import page_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .rollouts.rollout import Rollout

LARGEST_PAGE = 400_000_000
"""Characters of data that a page may hold: browsers refuse strings from about 500 million on."""
SCRIPTS = ("text", "colours", "tip", "cards", "charts", "page")
"""The files of the script, in the order in which they run."""


def write_page(
    path: str | os.PathLike[str],
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    rewards: Iterable[float | None] | None = None,
    title: str = "Rollouts",
    steps: Iterable[int] | None = None,
    advantages: Iterable[float | None] | None = None,
) -> Path:
    """Write rollouts as a self-contained HTML page.

    The page colours tokens by log t − log θ, by α or by θ/q, puts the student's and the mixture's completions of a
    prompt side by side, filters and sorts. A token shows its records on hover and on keyboard focus, with the tokens
    that each model would have preferred where the rollout has dense records. `#rollout-3` at the end of the page's
    address leads to the third rollout.

    Args:
        path: the file to write. Its folder is made. An existing file is replaced atomically: nobody reads half a page.
        rollouts: N rollouts, each with its T tokens and four records (T,). NaN is shown as absent, infinities as such.
        tokenizer: turns ids into text; the teacher's or the student's, since they share it.
        rewards: N rewards; None or NaN is shown as absent.
        title: heading of the page.
        steps: N training steps; with them the page has a slider over training, and draws rewards and α over it.
        advantages: N advantages; None or NaN is shown as absent.

    Returns:
        the path.

    Raises:
        ValueError: on no rollouts, on rewards, steps, advantages or a record of another length, and on more data than
            a browser can load.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            output = sampler.generate(["3 + 4 ="], n=4, max_tokens=8)
            write_page("output/rollouts.html", output.rollouts, sampler.backend.tokenizer, rewards=[0, 1, 0, 0])
        ```
    """
    path = Path(path)
    write_atomically(path, render_page(rollouts, tokenizer, rewards, title, steps, advantages).encode())
    return path


def render_page(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    rewards: Iterable[float | None] | None = None,
    title: str = "Rollouts",
    steps: Iterable[int] | None = None,
    advantages: Iterable[float | None] | None = None,
) -> str:
    """Return the HTML that `write_page` writes, for a notebook or a server; arguments and errors are the same."""
    if len(rollouts) == 0:
        raise ValueError("write_page got no rollouts; a page needs at least one: generate some before you write it.")
    count = len(rollouts)
    values = {"rewards": rewards, "advantages": advantages, "steps": steps}
    lists = {name: _one_per_rollout(name, each, count) for name, each in values.items()}
    lists["steps"] = [None if step is None else int(step) for step in lists["steps"]]
    content = page_data(rollouts, tokenizer, **lists)
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    if len(data) > LARGEST_PAGE:
        raise ValueError(
            f"the data of {count} rollouts takes {len(data):,} characters, a page can hold {LARGEST_PAGE:,}; "
            "pass fewer rollouts, or several pages."
        )
    return _fill_template(title, data)


def _fill_template(title: str, data: str) -> str:
    """Fill the gaps of the page. `data` is JSON without `<`; `title` is escaped here."""
    script = '"use strict";\n' + "".join(_read(f"{name}.js") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filling = {
        "__SCRIPT_HASH__": f"sha256-{digest}",
        "__TITLE__": html.escape(title),
        "__STYLE__": _read("page.css"),
        "__DATA__": data,
        "__SCRIPT__": script,
    }
    # One split, not successive replacements: a title or a completion may itself contain the name of a gap.
    return "".join(filling.get(part, part) for part in re.split("(__[A-Z_]+__)", _read("page.html")))


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("viewer", name).read_text(encoding="utf-8")


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
            + (f" (None where there is no {name.removesuffix('s')})." if name != "steps" else ".")
        )
    return values
