"""A folder of rollouts on disk: Parquet shards that appear whole or not at all, under the lock of one writer.

    folder/run.json                       settings, prompts and versions of the run: see `sampling_run`
    folder/README.md                      the dataset card, once all is there: see `card`
    folder/data/rollouts-000000.parquet   rollouts in order of (prompt_index, sample), so many in each shard
    folder/.lock                          held while a process writes

A file is written beside its place, flushed to the disk and renamed. A killed process leaves a file that ends in
`.tmp`, which nothing reads and the next writer removes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import Lock, write_atomically
from .dataset import from_dataset, to_dataset
from .dense import Dense
from .rollout import Rollout

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

RUN, CARD, DATA, LOCK = "run.json", "README.md", "data", ".lock"
KEPT = {"settings": dict, "prompts": int, "sha256": str, "versions": list}
"""Fields of run.json, each with its kind."""
FAILED = b"optimal_sampling.failed"
"""In a shard's metadata: JSON of (prompt_index, sample, reason) of each of its rollouts that could not be sampled."""
SHARDS = "rollouts-*.parquet"
"""The names of the shards, with a star for the number."""
SHARD = re.compile(re.escape(SHARDS).replace(r"\*", r"(\d{6,})"))
LEFTOVER = re.compile(rf"\.({SHARD.pattern}|{re.escape(RUN)}|{re.escape(CARD)})\.tmp")


class Key(NamedTuple):
    """The place of a rollout in a run: the sample-th of the prompt with this number."""

    prompt_index: int
    sample: int


def shard_name(number: int) -> str:
    """Return the name of a shard by its place among the shards, from 0."""
    return SHARDS.replace("*", f"{number:06}")


def iterate_rollouts(folder: str | os.PathLike[str]) -> Iterator[Rollout]:
    """Iterate over the rollouts of a folder in order of (prompt_index, sample), one shard in memory at a time.

    Raises:
        ValueError: where the folder holds no run, or a shard cannot be read.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            sample_to_folder(sampler, ["3 + 4 ="], "output/many", n=4, sampling=Sampling(max_tokens=8))
        print(max(float(rollout.alpha.mean()) for rollout in iterate_rollouts("output/many")))
        ```
    """
    store = RolloutFolder(folder)
    store.read_run()
    for path in store.shards():
        yield from from_dataset(store.read_shard(path).to_pylist())


def load_rollouts(folder: str | os.PathLike[str]) -> list[Rollout]:
    """Load the rollouts of a folder in order of (prompt_index, sample), each bit as it was sampled.

    A run that was interrupted gives the rollouts that it finished.

    Raises:
        ValueError: where the folder holds no run, or a shard cannot be read.

    Example:
        ```python
        with OptimalSamplingV1(model_teacher="large", model_theta="small") as sampler:
            sample_to_folder(sampler, ["3 + 4 ="], "output/few", sampling=Sampling(max_tokens=8))
        print(load_rollouts("output/few")[0].log_q)
        ```
    """
    return list(iterate_rollouts(folder))


class RolloutFolder:
    """A folder of rollouts. Reading takes no lock; to write, enter it as a context.

    Args:
        path: the folder; made by the first writer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = Lock(self.path / LOCK, f"the folder {str(self.path)!r}")

    def __enter__(self) -> RolloutFolder:
        """Lock the folder for this process and remove what a killed writer left.

        Raises:
            OSError: where the folder cannot be written.
            RuntimeError: where another writer holds it.
            ValueError: where it holds files, but no run.
        """
        try:
            self._refuse_foreign_files()
            (self.path / DATA).mkdir(parents=True, exist_ok=True)
            self._lock.__enter__()
        except OSError as error:
            raise OSError(
                error.errno,
                f"The folder {str(self.path)!r} cannot be written: {error.strerror}. Nothing was sampled. "
                "Name a folder that you may write, or one that does not exist yet.",
            ) from error
        try:
            for path in (*self.path.iterdir(), *(self.path / DATA).iterdir()):
                if LEFTOVER.fullmatch(path.name):
                    path.unlink()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.__exit__()

    def _refuse_foreign_files(self) -> None:
        """Refuse a folder with files but no run: a card would replace their README.md."""
        if not self.path.exists() or (self.path / RUN).exists():
            return
        found = [path for path in self.path.iterdir() if path.name not in (DATA, LOCK)]
        found += (self.path / DATA).iterdir() if (self.path / DATA).is_dir() else ()
        for path in found:
            if not LEFTOVER.fullmatch(path.name):
                raise ValueError(
                    f"The folder {str(self.path)!r} holds {path.name!r} and no {RUN}: it is no folder of rollouts. "
                    "Name a folder that is empty or does not exist."
                )

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all. It is on the disk when this returns.

        Raises:
            OSError: saying what could not be written and what is kept.
        """
        try:
            write_atomically(self.path / name, content, durable=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{name} ({len(content):,} bytes) could not be written to {str(self.path)!r}: {error.strerror}. "
                f"Kept: {len(self.shards())} whole shards, and no part of this file. Make room and run the same "
                "again: it goes on where this ended.",
            ) from error

    def read_run(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            ValueError: where there is none, it cannot be read, or a run did not write it.
        """
        try:
            found = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or any(
                not isinstance(found.get(name), kind) for name, kind in KEPT.items()
            ):
                raise ValueError(f"without {', '.join(KEPT)}")
            return found
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(self.path)!r} holds no {RUN} that can be read ({error}); wanted a folder that "
                "`sample_to_folder` wrote."
            ) from error

    def shards(self) -> list[Path]:
        """Return the shards that are there, in order."""
        found = {match: path for path in (self.path / DATA).glob("*") if (match := SHARD.fullmatch(path.name))}
        return [found[match] for match in sorted(found, key=lambda match: int(match[1]))]

    def write_shard(
        self,
        number: int,
        rollouts: dict[Key, Rollout],
        failed: dict[Key, str] | None = None,
        dense: Dense | None = None,
    ) -> None:
        """Write a shard.

        Args:
            number: its place among the shards, from 0.
            rollouts: the shard's rollouts by their places, in order.
            failed: places of the shard that have no rollout, with the reason of each; kept in the file's metadata, so
                that both appear at once.
            dense: dense records of the run, whose columns are in each shard.

        Raises:
            OSError: saying what could not be written and what is kept.
        """
        import pyarrow.parquet as pq
        from datasets import Value

        dataset = to_dataset(rollouts.values(), dense)
        for name in Key._fields:
            column = [getattr(key, name) for key in rollouts]
            dataset = dataset.add_column(name, column, feature=Value("int64"))  # type: ignore[call-arg]
        table = dataset.data.table.combine_chunks().cast(dataset.features.arrow_schema)
        if failed:
            listed = json.dumps([[*key, reason] for key, reason in failed.items()])
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), FAILED: listed.encode()})
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, table.schema) as writer:
            if len(table):  # `datasets` cannot read a group of no rows, which stands where all failed
                writer.write_table(table)
        self.write_file(f"{DATA}/{shard_name(number)}", buffer.getvalue())

    def read_shard(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a shard, or some columns of it.

        Raises:
            ValueError: where it cannot be read.
        """
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:  # reads the chunks of these columns, and no other byte
                return file.read() if columns is None else file.read(list(columns)).select(list(columns))
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(path, error) from error

    def keys(self, path: Path) -> list[Key]:
        """Return the places of a shard's rollouts, in their order."""
        columns = self.read_shard(path, Key._fields)
        return [Key(*pair) for pair in zip(*(columns[name].to_pylist() for name in Key._fields), strict=True)]

    def failed(self, path: Path) -> dict[Key, str]:
        """Return the places of a shard's rollouts that could not be sampled, with the reason of each.

        Raises:
            ValueError: where it cannot be read.
        """
        import pyarrow.parquet as pq

        try:
            listed = (pq.read_schema(path).metadata or {}).get(FAILED, b"[]")
            return {Key(*key): reason for *key, reason in json.loads(listed)}
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The shard {str(path)!r} cannot be read ({error}). Delete it and run the same again: its rollouts, and no "
        "others, are sampled anew."
    )
