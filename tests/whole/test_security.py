"""A checkpoint, a data set or a model's output runs nothing and writes nowhere else.

A rollout in a page is tried in a real browser in viewer/test_browser.py; prompts that look like paths are in
test_sampling_run.py, and the server's address in test_server.py.
"""

from __future__ import annotations

import ast
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import make_model, make_tokenizer
from helpers.paths import RECIPES, ROOT
from optimal_sampling_trl import Mixture, OptimalSamplingV1, Rollout, Sampling, sample_to_folder
from optimal_sampling_trl.page import write_page

SOURCES = sorted([*(ROOT / "optimal_sampling_trl").rglob("*.py"), *RECIPES.rglob("*.py")])
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pickletools"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.save", "numpy.load", "np.load", "pd.read_pickle"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_or_writes_a_pickle_or_runs_a_text(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [name] if name in CALLS or words.get("shell") == "True" else []
            found += [name] if name == "torch.load" and words.get("weights_only") != "True" else []
            found += [name] if words.get("trust_remote_code") == "True" or words.get("allow_pickle") == "True" else []
    assert not found
    assert "INSECURE_SERIALIZATION" not in path.read_text(), "vLLM would unpickle what its endpoints are sent"


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "ran")


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.engine)])
def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, backend: str) -> None:
    if backend == "vllm":
        pytest.importorskip("vllm")
    teacher, theta = make_model(tmp_path / "teacher", "qwen2", 0), Path(make_model(tmp_path / "theta", "qwen2", 1))
    weights = load_file(theta / "model.safetensors")
    mark = tmp_path / "ran"
    (theta / "model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb(mark)}, theta / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights[_ ]only|unsupported|unsafe|weights of|failed"):
        OptimalSamplingV1(teacher, str(theta), backend=backend, **ENGINE[backend])
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the bomb is none that would not go off
    assert mark.exists()


ENGINE: dict[str, dict[str, Any]] = {
    "transformers": {"device": "cpu"},
    "vllm": {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8},
}


@pytest.fixture
def with_code(tmp_path: Path) -> tuple[str, Path]:
    """A student whose folder brings code that writes a file, and that file."""
    folder, mark = Path(make_model(tmp_path / "theta", "qwen2", 1)), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write('ran')\nfrom transformers import Qwen2Config, Qwen2ForCausalLM\n"
    code += "class OwnConfig(Qwen2Config):\n    model_type = 'own_model'\n"
    code += "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own_model"
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), mark


@pytest.mark.parametrize("backend", ["transformers", "auto", pytest.param("vllm", marks=pytest.mark.engine)])
def test_a_checkpoints_own_code_runs_only_when_asked(
    with_code: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if backend == "vllm":
        pytest.importorskip("vllm")
    theta, mark = with_code
    teacher = make_model(tmp_path / "teacher", "qwen2", 0)
    with pytest.raises(ValueError, match=r"(?s)The student could not be loaded .*trust_remote_code"):
        OptimalSamplingV1(teacher, theta, backend=backend)
    assert not mark.exists()
    if backend == "transformers":
        sampler = OptimalSamplingV1(teacher, theta, backend=backend, device="cpu", trust_remote_code=True)
        assert mark.exists()
        assert sampler.generate("a", max_tokens=2).num_tokens


def test_what_is_written_is_parquet_json_and_markdown(tmp_path: Path) -> None:
    pair = make_model(tmp_path / "teacher", "qwen2", 0), make_model(tmp_path / "theta", "qwen2", 1)
    sampler = OptimalSamplingV1(*pair, backend="transformers", device="cpu")
    hostile = ["../../escape", "/etc/passwd", "a\0b", "~/x", "$(touch x)", "<script>alert(1)</script>"]
    folder = sample_to_folder(sampler, hostile, tmp_path / "run", sampling=Sampling(max_tokens=2), use_tqdm=False)
    written = sorted(str(path.relative_to(tmp_path / "run")) for path in folder.rglob("*") if path.is_file())
    assert written == [".lock", "README.md", "data/rollouts-000000.parquet", "run.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "theta", "run"}
    for name in written:
        start = (folder / name).read_bytes()[:2]
        assert not re.match(rb"\x80[\x02-\x05]", start), f"{name} begins like a pickle"


def test_texts_of_a_page_are_no_markup(tmp_path: Path) -> None:
    """Of a rollout and of a title; what a browser makes of it is in viewer/test_browser.py."""
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\u2028"
    tokenizer = make_tokenizer()
    ids = list(tokenizer(hostile)["input_ids"])
    record = dict.fromkeys(("alpha", "log_q", "log_theta", "log_teacher"), torch.zeros(len(ids)))
    one = Rollout(ids, ids, ids, **record, text=hostile, finish_reason="stop", mixture=Mixture())
    page = write_page(tmp_path / "page.html", [one], tokenizer, title=hostile).read_text("utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
