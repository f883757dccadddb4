"""What a pair must share and what a prompt must be: each refusal says what, got, wanted and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from helpers.models import CHAT_TEMPLATE, EOS, PAD, make_model, make_tokenizer
from optimal_sampling_trl.pairing import (
    Ending,
    check_decoder,
    check_prompt,
    check_same_tokens,
    check_vocabulary,
    context_length,
    encode,
    end_of_sequence,
    is_chat,
    is_student,
    load_config,
    load_generation_config,
    load_tokenizer,
    name_sources,
    read_pair,
)

WORDS = ("<unk>", "the", "cat", "sat", "on")
QWEN_IM_END, QWEN_END_OF_TEXT = 151645, 151643


def words(vocabulary: tuple[str, ...] = WORDS, name: str = "words", **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, their places being their ids, without a chat template."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", name_or_path=name, **options)


# One model


def test_the_student_as_its_own_teacher_is_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the student's tokenizer, template and endings, whatever the trainer made of them."""
    folder = make_model(tmp_path / "theta", "llama", 0)
    sources = name_sources("student", folder, {})
    assert sources[0] is sources[1]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "another"
    pair = read_pair(*sources, tokenizer=tokenizer, theta_settings=GenerationConfig(eos_token_id=[PAD]))
    assert pair.one_model
    assert (pair.teacher, pair.theta) == (folder, folder)
    assert pair.teacher_tokenizer is pair.tokenizer is tokenizer
    assert not pair.ending.folded
    assert not read_pair(*name_sources(folder, folder, {})).one_model
    with pytest.raises(ValueError, match="`revision` is 'old', which is the teacher's, and the teacher is the stud"):
        name_sources("student", folder, {"revision": "old"})
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is a folder of that name\. Write '\./student'"):
        is_student("student")
    assert not is_student("./student")


# One vocabulary


def test_equal_tokenizers_are_a_pair() -> None:
    check_same_tokens(words(), words(name="another"))
    check_same_tokens(words(eos_token="</s>"), words((*WORDS, "</s>")))  # added or of old: the ids mean the same


def test_the_first_token_that_differs_is_named() -> None:
    other = words(("<unk>", "the", "dog", "sat", "under"), name="dogs")
    with pytest.raises(ValueError, match="different tokenizers") as error:
        check_same_tokens(words(name="cats"), other)
    for text in (
        "token 2 is 'cat' in the teacher's (5 tokens, 'cats'), 'dog' in the student's (5 tokens, 'dogs')",
        "cannot be multiplied",
        "Pass two models of one family",
    ):
        assert text in str(error.value)


def test_a_longer_vocabulary_is_another() -> None:
    with pytest.raises(ValueError, match=r"token 5 is 'mat' in the teacher's .* None in the student's"):
        check_same_tokens(words((*WORDS, "mat")), words())
    with pytest.raises(ValueError, match=r"token 5 is None in the teacher's .* 'mat' in the student's"):
        check_same_tokens(words(), words((*WORDS, "mat")))


def test_added_tokens_count() -> None:
    teacher, theta = words(), words()
    teacher.add_special_tokens({"eos_token": "<|im_end|>"})
    with pytest.raises(
        ValueError, match=r"token 5 is '<\|im_end\|>' in the teacher's \(6 tokens.* None in the student"
    ):
        check_same_tokens(teacher, theta)
    theta.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"token 5 is '<\|im_end\|>' in the teacher's .* '<think>' in the student's"):
        check_same_tokens(teacher, theta)


def test_the_common_vocabulary_is_the_smaller() -> None:
    wide, narrow = Qwen2Config(vocab_size=152_064), Qwen2Config(vocab_size=151_936)
    assert check_vocabulary(wide, narrow, words()) == 151_936
    assert check_vocabulary(narrow, wide, words()) == 151_936
    assert check_vocabulary(LlamaConfig(vocab_size=5), LlamaConfig(vocab_size=6), words()) == 5


@pytest.mark.parametrize(("role", "sizes"), [("teacher", (4, 5)), ("student", (5, 4))])
def test_a_model_without_a_row_for_a_token_is_refused(role: str, sizes: tuple[int, int]) -> None:
    teacher, theta = (LlamaConfig(vocab_size=size, name_or_path=f"model-{size}") for size in sizes)
    text = rf"The {role} 'model-4' scores 4 tokens, but the tokenizer's last has id 4\. Resize its embeddings"
    with pytest.raises(ValueError, match=text):
        check_vocabulary(teacher, theta, words())


def test_the_shortest_context_counts() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=512), Qwen2Config(max_position_embeddings=128)) == 128
    assert context_length(PreTrainedConfig()) == 2**31


# Endings


def generation(*eos: int) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(eos))


def test_qwen3_chat_teacher_is_folded_into_a_base_student() -> None:
    ending = end_of_sequence(
        generation(QWEN_IM_END, QWEN_END_OF_TEXT), Qwen2Config(eos_token_id=QWEN_END_OF_TEXT), QWEN_END_OF_TEXT
    )
    assert ending == Ending(stop=(QWEN_END_OF_TEXT,), folded=(QWEN_IM_END,))


def test_qwen3_base_teacher_has_nothing_to_fold_into_a_chat_student() -> None:
    ending = end_of_sequence(
        Qwen2Config(eos_token_id=QWEN_END_OF_TEXT), generation(QWEN_IM_END, QWEN_END_OF_TEXT), QWEN_IM_END
    )
    assert ending == Ending(stop=(QWEN_IM_END, QWEN_END_OF_TEXT), folded=())


def test_the_tokenizers_ending_comes_first() -> None:
    assert end_of_sequence(generation(7), generation(3, 4), 4) == Ending(stop=(4, 3), folded=(7,))
    assert end_of_sequence(generation(7), generation(3), 5) == Ending(stop=(5, 3), folded=(7,))
    assert end_of_sequence(generation(7, 8, 7), LlamaConfig(eos_token_id=None), 5) == Ending((5,), (7, 8))
    assert end_of_sequence(LlamaConfig(eos_token_id=None), generation(3), None) == Ending((3,), ())


def test_folding_by_the_pairs_ending() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    folded = Ending(stop=(1, 0), folded=(2, 3)).fold(p.log())
    assert folded.exp()[0].tolist() == pytest.approx([0.1, 0.9, 0.0, 0.0])
    for ending in (Ending(stop=(1,), folded=()), Ending(stop=(), folded=(2,))):  # nothing to fold, or into nothing
        assert torch.equal(ending.fold(p.log()), p.log())


# Models


def save(config: PreTrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_a_decoder_is_loaded(tmp_path: Path) -> None:
    folder = save(LlamaConfig(vocab_size=77, eos_token_id=5), tmp_path)
    config = load_config(folder, "teacher")
    assert (config.vocab_size, config.name_or_path) == (77, folder)
    assert load_generation_config(folder, config) is config
    GenerationConfig(eos_token_id=[5, 6]).save_pretrained(folder)
    assert load_generation_config(folder, config).eos_token_id == [5, 6]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_missing_model_is_refused(role: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"The {role} could not be loaded from .*nowhere.*The folder does not exist"):
        load_config(missing, role)
    with pytest.raises(
        ValueError, match=rf"The {role}'s tokenizer could not be loaded from .*nowhere.*save_pretrained"
    ):
        load_tokenizer(missing, role)
    with pytest.raises(
        ValueError, match=rf"The {role} could not.*The folder holds no model.*a folder with a config\.json"
    ):
        load_config(str(tmp_path), role)
    with pytest.raises(ValueError, match=rf"The {role}'s tokenizer could not be loaded"):
        load_tokenizer(str(tmp_path), role)


def test_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), "student")
    check_same_tokens(loaded, make_tokenizer())
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.chat_template) == (EOS, PAD, CHAT_TEMPLATE)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("t5", "an encoder-decoder"),
        ("bart", "an encoder-decoder"),
        ("whisper", "an encoder-decoder"),
        ("llava", "a multimodal model"),
        ("qwen2_vl", "a multimodal model"),
        ("gemma3n", "a multimodal model"),
        ("qwen2_audio", "a multimodal model"),
        ("qwen2_5_omni", "a multimodal model without a vocabulary of its own"),
        ("granite_speech", "a multimodal model without a vocabulary of its own"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused(family: str, kind: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family](architectures=[f"Some{family}"])
    with pytest.raises(
        ValueError, match=rf"The teacher '' \(Some{family}\) is {kind}; wanted a decoder-only.*Pass a text"
    ):
        check_decoder(config, "teacher")
    with pytest.raises(ValueError, match=rf"The student '.+' \(Some{family}\) is {kind}; wanted a decoder-only"):
        load_config(save(config, tmp_path), "student")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "mixtral", "gpt2", "mpt"])
def test_decoders_of_text_are_accepted(family: str) -> None:
    check_decoder(CONFIG_MAPPING[family](), "teacher")


# Prompts


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], r"The student's prompt 3 is empty; wanted at least one token\. Drop it"),
        ([1] * 8, r"The student's prompt 3 has 8 tokens, but the context holds 8, of which one must be left"),
        ([1] * 20, r"The student's prompt 3 has 20 tokens.*Shorten the prompt, raise `max_model_len` \(of a trainer"),
        (
            [1, -1, 9],
            r"The student's prompt 3 holds token -1; wanted ids from 0 to 4\. Was it made with the tokenizer",
        ),
        ([1, 5], r"The student's prompt 3 holds token 5; wanted ids from 0 to 4"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(ids: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_prompt(ids, context=8, vocabulary=5, index=3, role="student")


def test_prompts_up_to_the_limits_are_read() -> None:
    check_prompt([0, 4], context=8, vocabulary=5, index=0, role="teacher")
    check_prompt([4] * 7, context=8, vocabulary=5, index=0, role="teacher")


def ids_of(text: str) -> list[int]:
    """What `models.make_tokenizer` gives: a token a byte."""
    return make_tokenizer()(text)["input_ids"]


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompt", "system_prompt", "chat", "text"),
    [
        ("hi", None, False, "hi"),
        ("hi", "Be short.", False, "Be short.\n\nhi"),
        ("hi", None, True, "[user] hi\n[assistant] "),
        ("hi", "Be short.", True, "[system] Be short.\n[user] hi\n[assistant] "),
        (CHAT, None, False, "[user] hi\n[assistant] "),
        (CHAT, None, True, "[user] hi\n[assistant] "),
        (CHAT, "Be short.", False, "[system] Be short.\n[user] hi\n[assistant] "),
        ([{"role": "system", "content": "a"}, *CHAT], None, False, "[system] a\n[user] hi\n[assistant] "),
    ],
)
def test_texts_and_messages(prompt: Any, system_prompt: str | None, chat: bool, text: str) -> None:
    assert encode(prompt, make_tokenizer(), system_prompt, chat, 0) == ids_of(text)


def test_messages_are_left_as_they_were() -> None:
    messages = [dict(CHAT[0])]
    encode(messages, make_tokenizer(), "Be short.", True, 0)
    assert messages == CHAT


@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_taken_as_they_are(chat: bool) -> None:
    for prompt in ([3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2]).numpy()):
        ids = encode(prompt, make_tokenizer(), None, chat, 0)
        assert ids == [3, 1, 2]
        assert [type(index) for index in ids] == [int] * 3


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (CHAT, True),
        (tuple(CHAT), True),
        ([*CHAT, 1], False),
        ([1, *CHAT], False),
        (CHAT[0], False),
        ([CHAT], False),
        ([], False),
        ("", False),
        ("7", False),
        ([1, 2], False),
        (torch.tensor([1, 2]), False),
        (None, False),
    ],
)
def test_a_chat_is_messages_and_nothing_else(prompt: Any, wanted: bool) -> None:
    assert is_chat(prompt) is wanted


@pytest.mark.parametrize("prompt", [None, 3, 1.5, [1.5, 2.0], ["a", "b"], [1, "b"], [CHAT[0], 1], {"role": "user"}])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Prompt 4 is .* \(\w+\); wanted a text, a list of token ids or a list of chat"
    ):
        encode(prompt, make_tokenizer(), None, False, 4)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", ["", [], (), torch.zeros(0, dtype=torch.int64)])
def test_an_empty_prompt_is_refused(prompt: Any, chat: bool) -> None:
    with pytest.raises(ValueError, match=r"Prompt 4 (is an empty text|holds no token); wanted at least one.* Drop it"):
        encode(prompt, make_tokenizer(), "Be short.", chat, 4)


def test_a_system_prompt_has_no_place_before_ids() -> None:
    text = r"Prompt 4 is given as token ids, before which the system prompt 'Be short\.' cannot be put\. Pass the text"
    with pytest.raises(ValueError, match=text):
        encode([1, 2], make_tokenizer(), "Be short.", False, 4)


def test_two_system_prompts_are_refused() -> None:
    text = r"begins with the system message 'a', and a system prompt was given as well \('Be short\.'\)\. Keep one"
    with pytest.raises(ValueError, match=text):
        encode([{"role": "system", "content": "a"}, *CHAT], make_tokenizer(), "Be short.", False, 4)


@pytest.mark.parametrize(("prompt", "chat"), [("the cat", True), (CHAT, False)])
def test_a_chat_needs_a_template(prompt: Any, chat: bool) -> None:
    with pytest.raises(
        ValueError, match=r"Prompt 4 needs a chat template, and the tokenizer 'words' has none\. Pass plain"
    ):
        encode(prompt, words(), None, chat, 4)
    assert encode("the cat", words(), None, False, 4) == [1, 2]
