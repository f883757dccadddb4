"""The card of a folder of rollouts: README.md, as the Hub shows it."""

from __future__ import annotations

import json
from typing import Any

from ..mixture import SWAP
from .folder import DATA, SHARDS, RolloutFolder

COLUMNS = {
    "prompt_ids": "token ids that the teacher read",
    "theta_prompt_ids": "token ids that the student read",
    "completion_ids": "the T sampled token ids, an end-of-sequence token included",
    "alpha": "T numbers in [0, 1]: weight of the teacher at each token",
    "log_q": "T numbers, nats: log-probability of the token under the distribution that it was drawn from, after "
    "temperature, penalties and truncation",
    "log_theta": "T numbers, nats: under the student at the sampling temperature, over the whole common vocabulary",
    "log_teacher": "T numbers, nats: under the teacher, likewise",
    "text": "the completion without special tokens",
    "finish_reason": "`stop` (an end-of-sequence token or a stop text) or `length`",
    "mixture": "how alpha was chosen: method, alpha_min, alpha_max, fixed_alpha, epsilon (nats a token), form, "
    "entropy_scale (nats), swap_top_k",
    "temperature": "the sampling temperature",
    "prompt_index": "number of the prompt in the data set that was given, from 0",
    "sample": "number of the completion of that prompt, from 0",
}
SCALARS = {
    "kl_theta_teacher": "KL(θ‖t) in nats",
    "kl_teacher_theta": "KL(t‖θ) in nats",
    "kl_q_theta": "KL(q‖θ) in nats, q before penalties and truncation",
    "kl_q_teacher": "KL(q‖t) in nats, likewise",
    "entropy_theta": "the student's entropy in nats",
    "entropy_teacher": "the teacher's entropy in nats",
    "overlap": "Σ min(θ, q), the probability that a draft of the student would be accepted",
}
LIKELIEST = {
    "dense_ids": "T lists of token ids: the student's k likeliest tokens in falling order, then the teacher's; one "
    "that is among both stands twice",
    "dense_log_theta": "their log-probabilities under the student, nats, at the sampling temperature",
    "dense_log_teacher": "under the teacher, likewise",
}
HEAD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: {path}
tags:
- optimal-sampling-trl
---
# Rollouts of a student and its teacher

Completions sampled token by token from the mixture {q} of a student θ and a teacher t, where α
is solved at each token, with the record of how each token was drawn.
"""
FORMULAS = {
    "geometric": "q(v) ∝ θ(v)^(1-α) · t(v)^α",
    "arithmetic": "q(v) = (1-α) · θ(v) + α · t(v)",
    SWAP: "q(v) = θ(v) · 1[v ∈ S] + α · t(v)",
}
"""The formula of q, by the form of the mixture, or by its method where that has a form of its own."""
LOAD = """## Loading

```python
from datasets import load_dataset
from optimal_sampling_trl import iterate_rollouts, load_rollouts

rollouts = load_rollouts("FOLDER")  # a list of Rollout; iterate_rollouts reads one shard at a time
dataset = load_dataset("FOLDER", split="train")  # or load_dataset("parquet", data_files="FOLDER/data/*.parquet")
```
"""


def make_card(store: RolloutFolder, run: dict[str, Any]) -> str:
    """Write the card of a folder.

    Args:
        store: the folder, its shards in place.
        run: the content of its run.json.

    Returns:
        the card's text.
    """
    settings = run["settings"]
    method = settings["mixture.method"]
    bounds = f"α in [{settings['mixture.alpha_min']:g}, {settings['mixture.alpha_max']:g}]"
    facts = {
        "teacher": _code(settings["model_teacher"]),
        "student": _code(settings["model_theta"]),
        "mixture": f"`{method}`, {bounds}",
        **_counts(store, run["prompts"]),
    }
    return "\n".join(
        [
            HEAD.format(
                path=f"{DATA}/{SHARDS}",
                q=FORMULAS[SWAP if method == SWAP else settings.get("mixture.form", "geometric")],
            ),
            _table(("", ""), facts),
            "## Columns\n",
            _table(("column", "what it is"), {f"`{name}`": text for name, text in _columns(settings).items()}),
            LOAD,
            "## Settings\n",
            _table(("setting", "value"), {f"`{name}`": _code(value) for name, value in settings.items()}),
            f"SHA-256 of the prompts' token ids: `{run['sha256']}`.\n",
            "## Versions\n",
            *("- " + ", ".join(f"{name} {number}" for name, number in one.items()) for one in run["versions"]),
            "",
        ]
    )


def _columns(settings: dict[str, Any]) -> dict[str, str]:
    """Return the description of each column. Dense records have columns where the run asked for them."""
    scalars = settings.get("dense.scalars", [])
    dense = {f"dense_{name}": f"T numbers: {SCALARS[name]}, of the whole common vocabulary" for name in scalars}
    return {**COLUMNS, **dense, **(LIKELIEST if settings.get("dense.top_k", 0) else {})}


def _counts(store: RolloutFolder, prompts: int) -> dict[str, str]:
    """Count the shards' rollouts and tokens, one shard in memory at a time."""
    import pyarrow.compute as pc

    rollouts = tokens = stopped = failed = 0
    alpha = 0.0
    for path in store.shards():
        table = store.read_shard(path, ("alpha", "finish_reason"))
        flat = pc.list_flatten(table["alpha"])
        rollouts, tokens = rollouts + len(table), tokens + len(flat)
        alpha += (pc.sum(flat).as_py() or 0.0) if len(flat) else 0.0
        stopped += table["finish_reason"].to_pylist().count("stop")
        failed += len(store.failed(path))
    return {
        "prompts": f"{prompts:,}",
        "rollouts": f"{rollouts:,}, of which {stopped:,} ended by themselves (`stop`)",
        **({"missing": f"{failed:,}, for which a model returned NaN"} if failed else {}),
        "tokens": f"{tokens:,} sampled",
        "mean α": f"{alpha / max(tokens, 1):.4f}",
    }


def _code(value: Any) -> str:
    """Write a value for a table's cell: as JSON, with the characters escaped that would end the cell or the code."""
    text = json.dumps(value, ensure_ascii=False).replace("`", "\\u0060").replace("|", "\\u007c")
    return f"`{text}`"


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in lines) + "\n"
