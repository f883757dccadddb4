"""The embedded pair: its task, its tokenizer, and the two checkpoints in the cache."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimal_sampling_trl.demo import pair


def test_the_tokenizer_has_as_many_entries_as_the_models_have_logits():
    tokenizer = pair.make_tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == pair.build(pair.RECIPES["student"]).config.vocab_size == 40
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.bos_token is None


def test_text_survives_the_round_trip_and_an_unknown_character_is_marked():
    tokenizer = pair.make_tokenizer()
    text = "sort these digits: 31.\n3141592653="
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("3Z").input_ids == [tokenizer.convert_tokens_to_ids("3"), tokenizer.unk_token_id]
    ids = tokenizer("0011233456<eos>").input_ids
    assert (len(ids), ids[-1]) == (pair.COMPLETION_LENGTH, tokenizer.eos_token_id)


def test_a_lone_user_turn_is_the_bare_prompt():
    tokenizer = pair.make_tokenizer()
    user, system = {"role": "user", "content": "31="}, {"role": "system", "content": "sort."}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == "31="
    turns = [system, user, {"role": "assistant", "content": "13"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "sort.\n31=13<eos>"


def test_only_exactly_the_right_text_is_rewarded():
    assert pair.answer("3141592653=") == "1123345569"
    completions = ["1123345569", "1123345569:", "112334556", "3141592653"]
    rewards = pair.reward(prompts=["3141592653="] * 4, completions=completions, completion_ids=None)
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert pair.exact_match(["3141592653="] * 4, completions) == 0.25


def test_the_splits_share_no_prompt_and_a_seed_repeats_them():
    train, test = pair.prompts("train", 4000, seed=0), pair.prompts("test", 4000, seed=0)
    assert {int(prompt[:-1]) % pair.PRIME for prompt in test} == {0}
    assert 0 not in {int(prompt[:-1]) % pair.PRIME for prompt in train}
    assert {len(prompt) for prompt in train + test} == {11}
    assert train[:10] == pair.prompts("train", 10, seed=0) != pair.prompts("train", 10, seed=1)
    assert pair.dataset("test", 3, seed=0).to_dict() == {"prompt": test[:3]}
    with pytest.raises(ValueError, match="split is 'valid'; it must be 'train' or 'test'"):
        pair.prompts("valid", 1, seed=0)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds no finished pair"):
        pair.make_pair(tmp_path)


def test_a_model_that_misses_its_target_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair, "DEFAULT", tmp_path / "empty")
    monkeypatch.setattr(pair, "RECIPES", {"teacher": pair.RECIPES["teacher"]._replace(steps=1)})
    with pytest.raises(RuntimeError, match=r"after 1 steps the teacher is right on 0\.00% .* wanted 98% to 100%"):
        pair.make_pair(tmp_path / "pair")
    assert list(tmp_path.iterdir()) == []


def test_an_older_pair_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_models(folder: Path) -> None:
        folder.mkdir()
        (folder / "pair.json").write_text(json.dumps({"recipe": pair.FINGERPRINT}))

    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "pair.json").write_text('{"recipe": "an older one"}')
    monkeypatch.setattr(pair, "DEFAULT", tmp_path / "empty")
    monkeypatch.setattr(pair, "write_models", write_models)
    pair.make_pair(tmp_path / "pair")
    assert pair.read_stamp(tmp_path / "pair") == {"recipe": pair.FINGERPRINT}
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_another_folder_gets_a_copy_of_the_cached_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user who ran the demo would else wait for the same training again."""
    cached = Path(pair.make_pair().teacher).parent
    monkeypatch.setattr(pair, "write_models", None)  # is not called
    made = Path(pair.make_pair(tmp_path / "pair").teacher).parent
    files = sorted(path.relative_to(cached) for path in cached.rglob("*") if path.is_file())
    assert sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file()) == files
    assert all((made / file).read_bytes() == (cached / file).read_bytes() for file in files)


def test_the_cached_pair_loads_and_keeps_its_promise():
    """Trains for a minute where the cache is empty. 200 samples of a teacher at .98: at most .9 by luck, 6e-9."""
    folders = pair.make_pair()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() == pair.make_tokenizer().get_vocab()
    for model, tokenizer in zip(models, tokenizers):
        assert model.config.vocab_size == len(tokenizer) == 40
        assert model.config.head_dim == 32
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert pair.measure(models[0], tokenizers[0], count=200) > 0.9
    assert pair.measure(models[1], tokenizers[1], count=200) < 0.2
