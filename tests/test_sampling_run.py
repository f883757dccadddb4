"""Sampling into a folder: what is written is what was sampled, whatever kills the process that writes it."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.children import wait_until
from helpers.models import EOS, PAD, make_model
from helpers.oracle import check_rollout
from optimal_sampling_trl import (
    Dense,
    Mixture,
    OptimalSamplingV1,
    Rollout,
    Sampling,
    iterate_rollouts,
    load_rollouts,
    sample_to_folder,
)
from optimal_sampling_trl.files import Lock
from optimal_sampling_trl.pairing import folder_digest, weight_digest
from optimal_sampling_trl.rollouts import folder as folder_module
from optimal_sampling_trl.rollouts import progress as progress_module
from optimal_sampling_trl.rollouts.folder import Key, RolloutFolder
from optimal_sampling_trl.rollouts.progress import Progress
from optimal_sampling_trl.rollouts.rollout import RECORDS
from optimal_sampling_trl.sampling_run import rollout_seed

PROMPTS = ["3 + 4 =", "a", "a", "../../../etc/passwd", "/abs/olute", "C:\\x\0|`$(rm)", "data/rollouts-000000.parquet"]
PROMPTS += ["é 語 🙂", "sort: 5 1 2", "a long one " * 20]
RUN: dict[str, Any] = {"n": 3, "seed": 5, "batch_size": 4, "sampling": Sampling(max_tokens=24)}
SHARDS = 8  # 30 rollouts, 4 in each

# Children are forked from a process that has imported everything once and holds nothing of this one.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["optimal_sampling_trl.generate", "optimal_sampling_trl.sampling_run", "datasets"])


def build(root: Path, **arguments: Any) -> OptimalSamplingV1:
    pair = {"model_teacher": str(root / "teacher"), "model_theta": str(root / "theta")}
    return OptimalSamplingV1(**{**pair, "backend": "transformers", "device": "cpu", "alpha_min": 0.0, **arguments})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_model(root / "teacher", "qwen2", 0, vocab_size=320)
    make_model(root / "theta", "qwen2", 1, tied=True)
    make_model(root / "trained", "qwen2", 2, tied=True)
    return root


@pytest.fixture(scope="module")
def sampler(root: Path) -> OptimalSamplingV1:
    return build(root)


@pytest.fixture(scope="module")
def whole(sampler: OptimalSamplingV1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    return sample_to_folder(sampler, PROMPTS, tmp_path_factory.mktemp("whole") / "run", use_tqdm=False, **RUN)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(one: Rollout, other: Rollout) -> bool:
    fields = vars(one).keys() - set(RECORDS)
    bits = all(
        torch.equal(getattr(one, name).view(torch.int32), getattr(other, name).view(torch.int32)) for name in RECORDS
    )
    return bits and all(getattr(one, name) == getattr(other, name) for name in fields)


# What is written.


def test_each_bit_comes_back(whole: Path, sampler: OptimalSamplingV1, root: Path) -> None:
    """The folder's rollouts are those that the engine gave in the same batches; each belongs to its prompt and key."""
    given: list[Rollout] = []
    generate = sampler.backend.generate

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(sampler.backend, name)

        def generate(self, *arguments: Any) -> list[Rollout]:
            given.extend(rollouts := generate(*arguments))
            return rollouts

    recorded = build(root)
    recorded.backend = Recorder()
    folder = sample_to_folder(recorded, PROMPTS, whole.parent / "again", use_tqdm=False, **RUN)
    loaded = load_rollouts(folder)
    assert len(loaded) == len(given) == 30
    assert all(map(same, loaded, given))
    assert content(folder) == content(whole)
    assert all(map(same, loaded, iterate_rollouts(whole)))
    assert [rollout.prompt_ids for rollout in loaded] == [
        sampler.encode(text)[0] for text in PROMPTS for _ in range(3)
    ]
    assert len({tuple(rollout.completion_ids) for rollout in loaded}) == 30, "equal prompts have seeds of their own"
    models = [AutoModelForCausalLM.from_pretrained(root / name).eval() for name in ("teacher", "theta")]
    for rollout in loaded[::7]:
        check_rollout(rollout, *models)


def test_datasets_reads_the_folder(whole: Path, tmp_path: Path) -> None:
    """By its card, and as plain Parquet."""
    keys = [(prompt, sample) for prompt in range(len(PROMPTS)) for sample in range(3)]
    for arguments in ({"path": str(whole)}, {"path": "parquet", "data_files": f"{whole}/data/*.parquet"}):
        data = load_dataset(**arguments, split="train", cache_dir=str(tmp_path))
        assert list(zip(data["prompt_index"], data["sample"])) == keys
        assert data["text"] == [rollout.text for rollout in load_rollouts(whole)]
        assert data.features["alpha"].feature.dtype == "float32"
        assert Mixture.from_dict(data[0]["mixture"]) == Mixture()


def test_the_card(whole: Path, root: Path) -> None:
    card = (whole / "README.md").read_text()
    rollouts = load_rollouts(whole)
    alpha = torch.cat([rollout.alpha for rollout in rollouts]).double()
    stopped = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    for text in (
        f'| teacher | `"{root}/teacher"` |',
        f'| student | `"{root}/theta"` |',
        "| mixture | `kl_symmetry`, α in [0, 1] |",
        "| prompts | 10 |",
        f"| rollouts | 30, of which {stopped} ended by themselves (`stop`) |",
        f"| tokens | {len(alpha):,} sampled |",
        f"| mean α | {float(alpha.mean()):.4f} |",
        "| `max_tokens` | `24` |",
        "| `seed` | `5` |",
        f"torch {torch.__version__}",
        'load_dataset("FOLDER", split="train")',
    ):
        assert text in card, text
    columns = re.findall(r"^\| `(\w+)` \| [^`]", card.split("## Columns")[1].split("## Loading")[0], re.MULTILINE)
    data = load_dataset("parquet", data_files=f"{whole}/data/*.parquet", split="train", streaming=True)
    assert {*columns, "finish_reason"} == set(next(iter(data)))
    assert all("nats" in line for line in card.splitlines() if line.startswith("| `log_"))


def test_a_text_of_a_setting_cannot_leave_its_cell(root: Path, tmp_path: Path) -> None:
    sampler = build(root, theta_system_prompt="a | b `c`\n# d\n---")
    card = (sample_to_folder(sampler, ["x"], tmp_path / "run", use_tqdm=False) / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "theta_system_prompt" in line]
    assert line == '| `theta_system_prompt` | `"a \\u007c b \\u0060c\\u0060\\n# d\\n---"` |'


def test_prompts_that_look_like_paths_stay_in_the_folder(whole: Path) -> None:
    shards = [f"data/rollouts-{number:06}.parquet" for number in range(SHARDS)]
    assert sorted(content(whole)) == sorted([*shards, "README.md", "run.json"])
    assert {path.name for path in whole.parent.iterdir()} <= {"run", "again"}


def test_a_run_that_is_done_samples_nothing(whole: Path, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    done = build(root, max_num_seqs=2)  # a setting of the room, which may change
    done.backend.generate = None
    sample_to_folder(done, PROMPTS, whole, use_tqdm=False, **RUN)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


def test_seeds() -> None:
    seeds = {
        rollout_seed(seed, Key(prompt, sample)) for seed in range(10) for prompt in range(100) for sample in range(8)
    }
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)


# Prompts.


def test_where_prompts_come_from(sampler: OptimalSamplingV1, tmp_path: Path) -> None:
    """A data set, a streamed one and a list of the same prompts give the same shards."""
    chat = [{"role": "user", "content": "hi"}]
    for name, prompts in {"text": ["a", "b"], "chat": [chat, chat]}.items():
        data = Dataset.from_dict({"answer": [1, 2], "prompt": prompts})
        sources = [prompts, iter(prompts), data, data.to_iterable_dataset()]
        folders = [
            sample_to_folder(sampler, source, tmp_path / f"{name}{index}", use_tqdm=False)
            for index, source in enumerate(sources)
        ]
        assert all(content(folder) == content(folders[0]) for folder in folders[1:])


REFUSED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "no column": (
        Dataset.from_dict({"text": ["a"]}),
        {},
        ["has the columns text", "wanted 'prompt'", "`rename_column`"],
    ),
    "splits": (DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}), {}, ["the splits train", "data[split]"]),
    "streamed": (IterableDataset.from_generator(lambda: iter([{"x": 1}])), {}, ["rows without 'prompt'"]),
    "a text": ("abc", {}, ["is the text 'abc'", "Wrap it"]),
    "none": ([], {}, ["`prompts` is empty"]),
    "an empty one": (["a", ""], {}, ["Prompt 1 is an empty text"]),
    "too long": (["a", "a" * 600], {}, ["prompt 1 has 600 tokens", "the context holds 512"]),
    "n": (["a"], {"n": 0}, ["`n` is 0", "at least 1"]),
    "batch": (["a"], {"batch_size": 0}, ["`batch_size` is 0", "at least 1"]),
    "seed": (["a"], {"seed": 0.5}, ["`seed` is 0.5", "wanted a whole number"]),
    "dense": (["a"], {"dense": Dense(top_k=400)}, ["`top_k` is 400", "wanted a whole number from 0 to"]),
    "no wish": (["a"], {"dense": 8}, ["`dense` is 8", "for example `Dense(top_k=32)`"]),
    "two seeds": (["a"], {"sampling": Sampling(seed=1)}, ["`sampling.seed` is 1", "Pass `seed=`"]),
    "sampling": (
        ["a"],
        {"sampling": {"max_tokens": 3}},
        ["sample_to_folder: `sampling` is {'max_tokens': 3}", "wanted a `Sampling`"],
    ),
    "mixture": (["a"], {"mixture": "fixed"}, ["sample_to_folder: `mixture` is 'fixed'", "wanted a `Mixture`"]),
    "mixtures": (["a"], {"mixture": [Mixture()]}, ["`mixture` is [Mixture(", "wanted a `Mixture`"]),
    "no mixture": (["a"], {"mixture": ""}, ["`mixture` is ''", "wanted a `Mixture`"]),
    "unread": (
        ["a"],
        {"mixture": Mixture("entropy", swap_top_k=3)},
        ["sample_to_folder: `swap_top_k` is 3", "'entropy' does not read it", "wanted it with 'top_k_swap'"],
    ),
    "bar": (["a"], {"use_tqdm": "false"}, ["sample_to_folder: `use_tqdm` is 'false'", "wanted True or False"]),
}


def test_dense_records_come_back_after_a_stop(sampler: OptimalSamplingV1, tmp_path: Path) -> None:
    """A shard that was lost is sampled again with its dense records, and every column is explained in the card."""
    settings = RUN | {"dense": Dense(("overlap", "kl_q_theta"), 3), "use_tqdm": False}
    folder = sample_to_folder(sampler, PROMPTS, tmp_path / "run", **settings)
    first = content(folder)
    card = (folder / "README.md").read_text()
    columns = pq.read_schema(folder / "data" / "rollouts-000001.parquet").names
    assert [name for name in columns if f"| `{name}` |" not in card] == []
    assert {"dense_overlap", "dense_kl_q_theta", "dense_ids", "dense_log_theta", "dense_log_teacher"} < set(columns)
    (folder / "data" / "rollouts-000001.parquet").unlink()
    sample_to_folder(sampler, PROMPTS, folder, **settings)
    assert content(folder) == first
    for rollout in load_rollouts(folder):
        assert rollout.dense is not None
        assert rollout.dense.ids.shape == (len(rollout.completion_ids), 6 if rollout.completion_ids else 0)
    for other, words in ((None, "`dense.top_k` was 3, now is 0"), (Dense(("overlap",), 3), "`dense.scalars` was")):
        with pytest.raises(ValueError, match=words):
            sample_to_folder(sampler, PROMPTS, folder, **settings | {"dense": other})


def test_a_run_without_dense_records_has_none_of_their_columns(whole: Path) -> None:
    columns = pq.read_schema(whole / "data" / "rollouts-000001.parquet").names
    assert [name for name in columns if "dense" in name] == []
    assert "dense_" not in (whole / "README.md").read_text().split("## Settings")[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_sampled(sampler: OptimalSamplingV1, tmp_path: Path, case: str) -> None:
    prompts, settings, words = REFUSED[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        sample_to_folder(sampler, prompts, tmp_path / "run", **{"use_tqdm": False, **settings})
    assert [part for part in words if part not in str(error.value)] == [], str(error.value)
    assert content(tmp_path) == {}


def test_numbers_of_numpy_are_pythons(sampler: OptimalSamplingV1, root: Path, whole: Path, tmp_path: Path) -> None:
    """A run that was begun with them is the run of the same numbers, and the other way round."""
    numbers = {name: np.int64(value) for name, value in RUN.items() if name != "sampling"}
    numbers["sampling"] = Sampling(max_tokens=np.int64(24), top_k=np.int64(-1))
    mixture = Mixture(alpha_min=np.float64(0), swap_top_k=np.int64(25))
    folder = sample_to_folder(sampler, PROMPTS, tmp_path / "run", use_tqdm=False, mixture=mixture, **numbers)
    assert content(folder) == content(whole)
    wish = {"dense": Dense(top_k=np.int64(2)), "use_tqdm": False}
    longest, plain = (build(root, max_model_len=kind(64)) for kind in (np.int64, int))
    sample_to_folder(longest, ["a"], tmp_path / "dense", **wish)
    sample_to_folder(plain, ["a"], tmp_path / "dense", **wish | {"dense": Dense(top_k=2)})


# Going on.

OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], str]] = {
    "max_tokens": ({}, {"sampling": Sampling(max_tokens=9)}, PROMPTS, "`max_tokens` was 24, now is 9"),
    "temperature": ({}, {"sampling": Sampling(24, 0.5)}, PROMPTS, "`temperature` was 1.0, now is 0.5"),
    "mixture": ({}, {"mixture": Mixture("entropy")}, PROMPTS, "`mixture.method` was 'kl_symmetry', now is 'entropy'"),
    "n": ({}, {"n": 2}, PROMPTS, "`n` was 3, now is 2"),
    "seed": ({}, {"seed": 6}, PROMPTS, "`seed` was 5, now is 6"),
    "batch": ({}, {"batch_size": 5}, PROMPTS, "`batch_size` was 4, now is 5"),
    "prompt": ({}, {}, [*PROMPTS[:-1], "b"], "`prompts` was '10 with SHA-256"),
    "fewer": ({}, {}, PROMPTS[:-1], "now is '9 with SHA-256"),
    "system": ({"theta_system_prompt": "S"}, {}, PROMPTS, "`theta_system_prompt` was None, now is 'S'"),
    "engine": ({"max_model_len": 400}, {}, PROMPTS, "`engine.max_model_len` was None, now is 400"),
    "dense": ({}, {"dense": Dense(top_k=2)}, PROMPTS, "`dense.top_k` was 0, now is 2"),
    "student": ({"model_theta": "trained"}, {}, PROMPTS, "`weights_theta` was '"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_are_refused(whole: Path, root: Path, case: str) -> None:
    pair, settings, prompts, words = OTHER[case]
    pair = {name: str(root / value) if name == "model_theta" else value for name, value in pair.items()}
    before = content(whole)
    with pytest.raises(ValueError, match="was begun with other settings") as error:
        sample_to_folder(build(root, **pair), prompts, whole, use_tqdm=False, **{**RUN, **settings})
    assert words in str(error.value)
    assert "or name another folder" in str(error.value)
    assert content(whole) == before


def test_a_student_trained_in_its_folder_is_another(root: Path, tmp_path: Path) -> None:
    """The same weights under another name are the same student; other weights under the same name are not."""
    names = {"one": 1, "copy": 1, "trained": 2}
    for name, seed in names.items():
        make_model(tmp_path / name, "qwen2", seed, tied=True)
    folder = tmp_path / "run"
    sample_to_folder(build(root, model_theta=str(tmp_path / "one")), ["a"], folder, use_tqdm=False)
    sample_to_folder(build(root, model_theta=str(tmp_path / "copy")), ["a"], folder, use_tqdm=False)
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "trained").rename(tmp_path / "one")
    with pytest.raises(ValueError, match="`weights_theta` was"):
        sample_to_folder(build(root, model_theta=str(tmp_path / "one")), ["a"], folder, use_tqdm=False)


EDITED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "angles": (
        "config.json",
        lambda config: config["rope_parameters"].update(rope_theta=10.0),
        "`config_theta.rope_parameters` was {'rope_theta': 10000.0, 'rope_type': 'default'}, now is {'rope_theta': 10",
    ),
    "norms": (
        "config.json",
        lambda config: config.update(rms_norm_eps=0.5),
        "`config_theta.rms_norm_eps` was 1e-06, now is 0.5",
    ),
    "context": (
        "config.json",
        lambda config: config.update(max_position_embeddings=256),
        "`context` was 512, now is 256; `config_theta.max_position_embeddings` was 512",
    ),
    "ending": (
        "generation_config.json",
        lambda config: config.update(eos_token_id=[EOS, 10]),
        "settings: `ending.stop` was [256], now is [256, 10]. Its",
    ),
}


@pytest.mark.parametrize("case", EDITED)
def test_a_student_of_other_settings_beside_its_weights_is_another(root: Path, tmp_path: Path, case: str) -> None:
    name, edit, words = EDITED[case]
    make_model(tmp_path / "one", "qwen2", 1, tied=True)
    pair, folder = {"model_theta": str(tmp_path / "one")}, tmp_path / "run"
    sample_to_folder(build(root, **pair), ["a"], folder, use_tqdm=False)
    config = json.loads((tmp_path / "one" / name).read_text())
    edit(config)
    (tmp_path / "one" / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was begun with other settings") as error:
        sample_to_folder(build(root, **pair), ["a"], folder, use_tqdm=False)
    assert words in str(error.value)


def test_the_teachers_own_ending_is_a_setting(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "teacher", tmp_path / "one")
    pair, folder = {"model_teacher": str(tmp_path / "one")}, tmp_path / "run"
    sample_to_folder(build(root, **pair), ["a"], folder, use_tqdm=False)
    config = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [EOS, PAD]}))
    with pytest.raises(ValueError, match=r"settings: `ending.folded` was \[\], now is \[257\]\. Its"):
        sample_to_folder(build(root, **pair), ["a"], folder, use_tqdm=False)


def test_a_loaded_model_is_that_of_its_folder(root: Path, whole: Path) -> None:
    """Its configuration in memory is the one that the files have, whatever its attention runs on."""
    loaded = AutoModelForCausalLM.from_pretrained(root / "theta", attn_implementation="eager")
    loaded.config.use_cache = False  # as a trainer with gradient checkpointing leaves it
    sample_to_folder(build(root, model_theta=loaded), PROMPTS, whole, use_tqdm=False, **RUN)


def test_a_buffer_of_the_files_is_a_weight(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "one", "gemma4_text", 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = weight_digest(model)
    name, scale = next(item for item in model.named_buffers() if item[0].endswith("layer_scalar"))
    assert name in load_file(f"{folder}/model.safetensors")
    scale.mul_(5)
    assert weight_digest(model) != before
    scale.div_(5)
    angles = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    angles.mul_(5)  # computed from the configuration, which has its own place among the settings
    assert weight_digest(model) == before


@pytest.mark.parametrize("place", [0, 64, 5_000, -1])
def test_the_digests_cover_every_weight(tmp_path: Path, place: int) -> None:
    """One number of one weight, anywhere in the middle of a file, is another student."""
    name = make_model(tmp_path / "one", "qwen2", 1, hidden=64, layers=4)
    model = AutoModelForCausalLM.from_pretrained(name)
    digests = [(weight_digest(model), folder_digest(tmp_path / "one"))]
    weight = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[min(place, weight.numel() - 1)] += 1e-3
    model.save_pretrained(tmp_path / "other")
    digests.append((weight_digest(model), folder_digest(tmp_path / "other")))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1]
    (tmp_path / "other").rename(tmp_path / "renamed")
    assert folder_digest(tmp_path / "renamed") == digests[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_the_digest_takes_any_type(dtype: torch.dtype) -> None:
    def digest(weight: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return weight_digest(module)

    weight = torch.arange(12).reshape(3, 4).to(dtype)
    assert digest(weight) == digest(weight.clone())
    assert digest(weight) != digest(weight.T.contiguous())
    assert digest(weight.T) == digest(weight.T.contiguous())  # the order of the entries, whatever the memory's
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))


def test_a_field_that_an_older_version_did_not_know_had_its_default(
    sampler: OptimalSamplingV1, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of a version without `min_p`, `mixture.epsilon` and whole digests goes on; other values do not."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["weights_teacher"] = run["settings"]["weights_theta"] = "0123abcd"
    for name in ("min_p", "mixture.epsilon", "context", "ending.stop", "ending.folded"):
        del run["settings"][name]
    del run["configurations"]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "data" / "rollouts-000002.parquet").unlink()
    sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN)
    for words in ("a part of the weights of `model_theta`", "the models' configurations and end tokens"):
        assert words in caplog.text
    shard = "data/rollouts-000002.parquet"
    assert content(folder)[shard] == content(whole)[shard]
    with pytest.raises(ValueError, match=r"`mixture.epsilon` was 0.05, now is 0.1"):
        sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN, mixture=Mixture("trust_region", epsilon=0.1))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads are counted by Linux")
def test_going_on_reads_two_columns_of_a_shard(tmp_path: Path) -> None:
    T, count = 8192, 8
    rollouts = {
        Key(index, 0): Rollout(
            [1], [1], list(range(T)), *torch.randn(4, T).unbind(0), text="x", finish_reason="stop", mixture=Mixture()
        )
        for index in range(count)
    }

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    with RolloutFolder(tmp_path / "run") as store:
        store.write_shard(0, rollouts)
        (path,) = store.shards()
        store.keys(path)  # what is imported is read once
        before = bytes_read()
        assert store.keys(path) == list(rollouts)
        assert bytes_read() - before < path.stat().st_size / 4


def work(root: Path, folder: Path, die: str | None = None, limit: int | None = None) -> None:
    """A writer in a process of its own.

    Args:
        die: a moment of the fourth shard at which it kills itself: see `test_killed_at_each_moment`.
        limit: bytes of the largest file that it may write, as on a disk that is full.
    """
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if die is not None:
        owner, name = (Path, die) if die in ("open", "replace") else (os, "fsync")
        true, shard = getattr(owner, name), "rollouts-000003"

        def fatal(*arguments: Any, **options: Any) -> Any:
            file = str(arguments[0]) if owner is Path else os.readlink(f"/proc/self/fd/{arguments[0]}")
            parent = die == "fsync of the folder" and (folder / "data" / f"{shard}.parquet").exists()
            if shard in file and die == "fsync":
                os.ftruncate(arguments[0], 1000)  # half of it has reached the disk
            if parent or (shard in file and die != "fsync of the folder"):
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*arguments, **options)

        setattr(owner, name, fatal)
    try:
        sample_to_folder(build(root), PROMPTS, folder, use_tqdm=False, **RUN)
    except OSError as error:
        Path(f"{folder}.error").write_text(f"{error.errno} {error}")


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def join(process: BaseProcess) -> int | None:
    """Wait for a process, as long as it shows a sign of life; returns its exit code."""
    wait_until(lambda: process.exitcode is not None, process.pid or 0, pause=0.1)
    return process.exitcode


def check_prefix(folder: Path, whole: Path) -> None:
    """After a kill: every shard is one of the uninterrupted run's, and can be read; the card is not there."""
    shards = {name: data for name, data in content(folder).items() if name.endswith(".parquet")}
    assert shards.items() <= content(whole).items()
    if (folder / "run.json").exists():
        assert len(load_rollouts(folder)) == sum(len(RolloutFolder(whole).keys(whole / name)) for name in shards)


def test_killed_at_any_moment(whole: Path, root: Path, tmp_path: Path) -> None:
    """kill -9 six times, some milliseconds after the next shard: in the end the files are the uninterrupted run's."""
    chance = random.Random(0)
    folder, left = tmp_path / "run", []
    for shard in (0, 1, 2, 4, 5, 6):
        process = start(work, root, folder)
        path = folder / "data" / f"rollouts-{shard:06}.parquet"
        wait_until(lambda: path.exists() or process.exitcode is not None, process.pid or 0, pause=0.001)  # noqa: B023
        assert path.exists(), f"{path} did not appear"
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        left.append(len(list(folder.glob("data/rollouts-*"))))
        check_prefix(folder, whole)
    print("shards after each kill:", left)
    process = start(work, root, folder)
    assert join(process) == 0
    assert content(folder) == content(whole)


@pytest.mark.parametrize("moment", ["open", "fsync", "replace", "fsync of the folder"])
def test_killed_at_each_moment(
    whole: Path, root: Path, sampler: OptimalSamplingV1, tmp_path: Path, moment: str
) -> None:
    """Before the file is made, half-way through it, before it gets its name, and after."""
    folder = tmp_path / "run"
    process = start(work, root, folder, moment)
    assert join(process) == -signal.SIGKILL
    names = {path.name for path in (folder / "data").iterdir()}
    assert len([name for name in names if not name.startswith(".")]) == (4 if moment == "fsync of the folder" else 3)
    assert (".rollouts-000003.parquet.tmp" in names) == (moment in ("fsync", "replace"))
    check_prefix(folder, whole)
    sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN)
    assert content(folder) == content(whole)


def test_a_full_disk(whole: Path, root: Path, sampler: OptimalSamplingV1, tmp_path: Path) -> None:
    """The kernel refuses the largest shard: the error says what is kept, and that is kept."""
    names = [f"data/rollouts-{number:06}.parquet" for number in range(SHARDS)]
    sizes = [len(content(whole)[name]) for name in names]
    full, folder = sizes.index(max(sizes)), tmp_path / "run"
    assert full > 0
    join(start(work, root, folder, None, max(sizes[:full])))
    message = Path(f"{folder}.error").read_text()
    for words in (
        f"{names[full]} ({sizes[full]:,} bytes) could not be written",
        "File too large",
        f"Kept: {full} whole shards",
        "run the same again",
    ):
        assert words in message
    assert sorted(content(folder)) == [*names[:full], "run.json"]
    check_prefix(folder, whole)
    sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN)
    assert content(folder) == content(whole)


def hold(folder: Path) -> None:
    with RolloutFolder(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_one_writer_at_a_time(sampler: OptimalSamplingV1, tmp_path: Path) -> None:
    """Another process is refused, also in this process, until the holder dies; readers are not."""
    folder = sample_to_folder(sampler, ["a"], tmp_path / "run", use_tqdm=False)
    process = start(hold, folder)
    wait_until((folder / "held").exists, process.pid or 0, pause=0.001)
    with pytest.raises(RuntimeError, match=rf"Another writer \(process {process.pid} on .*\) has the folder"):
        sample_to_folder(sampler, ["a"], folder, use_tqdm=False)
    assert len(load_rollouts(folder)) == 1
    process.kill()
    process.join()
    with (
        RolloutFolder(folder),
        pytest.raises(RuntimeError, match=rf"process {os.getpid()} on .* one at a time\. Wait"),
        RolloutFolder(folder),
    ):
        pass
    sample_to_folder(sampler, ["a"], folder, use_tqdm=False)


# Folders that are not, or no longer, what they should be.


@pytest.mark.parametrize("damage", ["cut", "other columns", "other rows"])
def test_a_damaged_shard(whole: Path, sampler: OptimalSamplingV1, tmp_path: Path, damage: str) -> None:
    """It is refused by name; once it is deleted its rollouts are sampled anew."""
    folder = tmp_path / "run"
    for name, data in content(whole).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    shard = folder / "data" / "rollouts-000002.parquet"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "other columns":
        Dataset.from_dict({"x": [1]}).to_parquet(shard)
    else:
        shard.write_bytes((folder / "data" / "rollouts-000001.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"rollouts-000002.* Delete it and run the same again"):
        sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN)
    shard.unlink()
    assert len(load_rollouts(folder)) == 26
    sample_to_folder(sampler, PROMPTS, folder, use_tqdm=False, **RUN)
    assert content(folder) == content(whole)


def test_folders_of_others(sampler: OptimalSamplingV1, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'README.md' and no run.json: it is no folder of rollouts"):
        sample_to_folder(sampler, ["a"], tmp_path, use_tqdm=False)
    assert content(tmp_path) == {"README.md": b"mine"}
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(OSError, match=r"README.md' cannot be written: Not a directory\. Nothing was sampled"):
        sample_to_folder(sampler, ["a"], tmp_path / "README.md", use_tqdm=False)
    with pytest.raises(OSError, match=r"/proc/nowhere' cannot be written: .*Nothing was sampled"):
        sample_to_folder(sampler, ["a"], "/proc/nowhere", use_tqdm=False)
    with pytest.raises(ValueError, match=r"holds no run.json that can be read"):
        load_rollouts(tmp_path)
    stray = whole.parent / "again" / "data" / "rollouts-000099.parquet"
    if stray.parent.exists():
        stray.write_bytes((whole / "data" / "rollouts-000000.parquet").read_bytes())
        with pytest.raises(ValueError, match=r"holds \['rollouts-000099.parquet'\], which are not of its run"):
            sample_to_folder(sampler, PROMPTS, whole.parent / "again", use_tqdm=False, **RUN)
        stray.unlink()


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"settings": [], "prompts": 1, "sha256": "", "versions": [{}]}'])
def test_a_run_file_of_another_program(sampler: OptimalSamplingV1, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    for use in (lambda: load_rollouts(tmp_path), lambda: sample_to_folder(sampler, ["a"], tmp_path, use_tqdm=False)):
        with pytest.raises(ValueError, match=r"holds no run\.json that can be read \(.*\); wanted a folder that"):
            use()
    assert (tmp_path / "run.json").read_text() == text


def test_other_versions_are_said(sampler: OptimalSamplingV1, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = sample_to_folder(sampler, ["a"], tmp_path / "run", use_tqdm=False)
    run = json.loads((folder / "run.json").read_text())
    run["versions"][0]["torch"] = "1.0"
    (folder / "run.json").write_text(json.dumps(run))
    sample_to_folder(sampler, ["a"], folder, use_tqdm=False)
    assert "rows may differ from those of an uninterrupted run" in caplog.text
    assert [one["torch"] for one in json.loads((folder / "run.json").read_text())["versions"]] == [
        "1.0",
        torch.__version__,
    ]


# Progress.


def test_the_bar(sampler: OptimalSamplingV1, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = sampler.generate(PROMPTS, max_tokens=8, seed=0, use_tqdm=True)
    assert output.alpha_stats is not None
    shown = capsys.readouterr().err
    assert re.search(rf"10/10 .* tokens/s, mean α {output.alpha_stats['mean']:.3f}", shown)
    sampler.generate(PROMPTS, max_tokens=8, seed=0)
    sample_to_folder(sampler, PROMPTS, tmp_path / "quiet", use_tqdm=False)
    assert capsys.readouterr().err == ""
    folder = sample_to_folder(sampler, PROMPTS, tmp_path / "shown", **{**RUN, "use_tqdm": True})
    alpha = torch.cat([rollout.alpha for rollout in load_rollouts(folder)])
    assert re.search(rf"30/30 .* tokens/s, mean α {float(alpha.mean()):.3f}", capsys.readouterr().err)
    (folder / "data" / "rollouts-000000.parquet").unlink()
    sample_to_folder(sampler, PROMPTS, folder, **{**RUN, "use_tqdm": True})
    assert "26/30" in capsys.readouterr().err


def test_prompts_of_the_teachers_own(sampler: OptimalSamplingV1, root: Path, tmp_path: Path) -> None:
    """From a column, on resuming too, and from a list; a run with others is another run."""
    rows = [{"prompt": text, "teacher_prompt": own} for text, own in (("3 + 4 =", "It is 7: 3 + 4 ="), ("a", None))]
    data = Dataset.from_list(rows)
    run: dict[str, Any] = {"n": 2, "batch_size": 2, "sampling": Sampling(max_tokens=4), "use_tqdm": False}
    sample_to_folder(sampler, data, tmp_path / "column", **run)
    rollouts = load_rollouts(tmp_path / "column")
    models = [AutoModelForCausalLM.from_pretrained(root / role, dtype=torch.float32) for role in ("teacher", "theta")]
    for rollout, (prompt, own) in zip(rollouts, [tuple(row.values()) for row in rows for _ in range(2)], strict=True):
        assert sampler.backend.tokenizer.decode(rollout.prompt_ids) == (own or prompt)
        assert sampler.backend.tokenizer.decode(rollout.theta_prompt_ids) == prompt
        check_rollout(rollout, *models)
    next((tmp_path / "column").rglob("rollouts-000001.parquet")).unlink()
    sample_to_folder(sampler, data, tmp_path / "column", **run)
    sample_to_folder(
        sampler, list(data["prompt"]), tmp_path / "list", teacher_prompts=data["teacher_prompt"][:], **run
    )
    for folder in ("column", "list"):
        found = load_rollouts(tmp_path / folder)
        assert [one.completion_ids for one in found] == [one.completion_ids for one in rollouts]
        assert [one.prompt_ids for one in found] == [one.prompt_ids for one in rollouts]
    with pytest.raises(ValueError, match="was begun with other settings: `prompts`"):
        sample_to_folder(sampler, data.remove_columns("teacher_prompt"), tmp_path / "column", **run)
    with pytest.raises(ValueError, match="`teacher_prompts`: got 1 of them; wanted one for each of the 2"):
        sample_to_folder(sampler, ["a", "b"], tmp_path / "bad", teacher_prompts=["c"], **run)


def test_a_look_at_a_batch_in_progress(sampler: OptimalSamplingV1, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step: the rows that have ended, the tokens so far and the sum of their α."""
    looks: list[tuple[int, int, float]] = []
    monkeypatch.setattr(progress_module, "EVERY", -1.0)
    monkeypatch.setattr(Progress, "peek", lambda self, *look: looks.append(look))
    rollouts = sampler.generate(PROMPTS, max_tokens=60, temperature=2.0, n=3, seed=0, use_tqdm=True).rollouts
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    assert len(set(lengths)) > 2, "some rows end before others"
    for step, (ended, tokens, alpha) in enumerate(looks, 1):
        assert ended == sum(length <= step for length in lengths)
        assert tokens == sum(min(length, step) for length in lengths)
        assert alpha == pytest.approx(
            sum(float(rollout.alpha[:step].double().sum()) for rollout in rollouts), rel=1e-5
        )
    assert len(looks) == max(lengths)


def test_names() -> None:
    assert folder_module.SHARD.fullmatch("rollouts-1000000.parquet")


def test_a_child_that_was_forked_under_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    """As a data loader's workers are: they live longer than `train()`."""
    with Lock(tmp_path / "lock", "the folder"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with Lock(tmp_path / "lock", "the folder"):
            assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
