"""The tokenizer stage: lossless, deterministic, loadable by transformers, with a chat template that masks right."""

import random
import subprocess
import sys

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from cordee.cost import Cost
from cordee.errors import Stopped, UserError
from cordee.stage import Context
from pretrain.tokenizer import PIECES, SMALLEST, SPECIAL_TOKENS, Config, cost, run

SENTENCES = "Tuots umauns naschan libers ed eguels in dignità e drets. सभी मनुष्यों को गौरव और अधिकारों के मामले में"
CHAT = [
    {"role": "system", "content": "Answer in Romansh. "},
    {"role": "user", "content": "Tge è quai?"},
    {"role": "assistant", "content": "ในข้อนี้ "},
    {"role": "user", "content": " \n"},
    {"role": "assistant", "content": " Gea.\n"},
]


def corpus(folder, seed=0, documents=300):
    """A corpus of invented text, of which the held-out split has its own alphabet."""
    chance, words = random.Random(seed), SENTENCES.split()  # noqa: S311 - invented text, no secret
    folder.mkdir()
    texts = [" ".join(chance.choices(words, k=20)) + " <s>12345</s>\n" for _ in range(documents)]
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    pq.write_table(pa.table({"text": [SENTENCES, "ЖЖЖЖ " * 20]}), folder / "heldout.parquet")
    return folder


def train(corpus_folder, out, vocab_size=320):
    config = Config.model_validate({"corpus": str(corpus_folder), "vocab_size": vocab_size})
    return run(config, Context(out=out, seed=0, events=out.parent / "events.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    train(corpus(place / "corpus"), place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_it_has_the_size_asked_for_and_the_special_tokens_in_front(folder, tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(9))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(0x250))),
        " 's  two  spaces , and\t\ttabs \r\n\r\n end ",
        "e\u0301 is not é",
        "\u200cक्षत्रिय می‌خواهم 🏔️\U0010ffff\x00\ufeff",
        "'t n't 's . ! ?",
    ],
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_encoding_puts_one_bos_in_front_and_nothing_behind(tokenizer):
    plain = tokenizer("Tuots umauns", add_special_tokens=False)["input_ids"]
    assert tokenizer("Tuots umauns")["input_ids"] == [tokenizer.bos_token_id, *plain]
    assert tokenizer.bos_token_id not in plain


def test_text_is_cut_into_words_digits_and_signs():
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated").pre_tokenize_str
    assert [piece for piece, _ in cut("L'umaun 12\u0663 mesas!?\n\n  x")] == [
        *("L", "'umaun", " ", "1", "2", "\u0663", " mesas", "!?\n\n", " ", " x"),
    ]
    for word in ("हिन्दी", "ภาษาไทย", "ශ්\u200dරී", "العَرَبِيَّة"):
        assert [piece for piece, _ in cut(f"{word} {word}")] == [word, f" {word}"]


def test_the_same_corpus_gives_the_same_bytes_in_another_process(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from cordee.stage import Context\n"
        "from pretrain.tokenizer import Config, run\n"
        "config = Config.model_validate({'corpus': sys.argv[1], 'vocab_size': 320})\n"
        "run(config, Context(out=Path(sys.argv[2]), seed=9, events=Path(sys.argv[2] + '.events')))\n"
    )
    out = tmp_path / "again"
    out.mkdir()
    (out / "tokenizer.json").write_text("what a kill left")
    environment = {"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, folder.parent / "corpus", out], check=True, env=environment)
    for file in folder.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_another_corpus_gives_another_tokenizer(folder, tmp_path):
    train(corpus(tmp_path / "corpus", seed=1), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()


def test_nothing_is_learnt_from_the_held_out_split(tokenizer):
    assert len(tokenizer("ЖЖЖЖ", add_special_tokens=False)["input_ids"]) == len("ЖЖЖЖ".encode())


def test_bytes_per_token_is_that_of_the_held_out_split(folder, tokenizer):
    metrics = train(folder.parent / "corpus", folder)
    texts = [SENTENCES, "ЖЖЖЖ " * 20]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    text_bytes = sum(len(text.encode()) for text in texts)
    assert metrics == {"vocab_size": 320, "bytes_per_token": text_bytes / tokens}


def test_a_corpus_too_small_for_the_vocabulary_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size: the corpus has only \d+ merges, so at most \d+ tokens, not"):
        train(corpus(tmp_path / "corpus"), tmp_path / "out", vocab_size=20_000)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValidationError):
        Config.model_validate({"corpus": str(tmp_path), "vocab_size": SMALLEST - 1})


def test_a_folder_that_is_no_corpus_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"corpus: holds no train\.parquet"):
        train(tmp_path, tmp_path / "out")


def test_a_stop_is_heard(tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        train(corpus(tmp_path / "corpus"), tmp_path / "out")


def test_the_cost_hands_the_vocabulary_on(tmp_path):
    config = Config.model_validate({"corpus": str(tmp_path), "vocab_size": 320})
    assert cost(config, {"corpus": Cost(tokens=5.0, rows=2)}) == Cost(tokens=5.0, rows=2, vocab_size=320)


def test_a_chat_is_rendered_without_a_stray_character(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<s><|system_start|>Answer in Romansh. <|system_end|><|user_start|>Tge è quai?<|user_end|>"
        "<|assistant_start|>ในข้อนี้ <|assistant_end|><|user_start|> \n<|user_end|>"
        "<|assistant_start|> Gea.\n<|assistant_end|>"
    )


def test_a_chat_has_one_bos_however_it_is_encoded(tokenizer):
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # why the line above says False


def test_the_generation_prompt_is_a_prefix_of_the_chat_with_the_answer(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT[:3], return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == CHAT[2]["content"] + "<|assistant_end|>"


def test_the_mask_covers_each_answer_and_its_end_and_nothing_else(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    masked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    answers = [f"{message['content']}<|assistant_end|>" for message in CHAT if message["role"] == "assistant"]
    assert tokenizer.decode(masked) == "".join(answers)
    start = tokenizer.convert_tokens_to_ids("<|assistant_start|>")
    assert start not in masked
    assert len(masked) == sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "assistant", "content": "a"}], "must not come first"),
        ([{"role": "tool", "content": "a"}], "no role tool"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "must come first"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be text"),
    ],
)
def test_a_chat_that_the_template_has_no_form_for_is_refused(tokenizer, messages, problem):
    with pytest.raises(jinja2.exceptions.TemplateError, match=problem):
        tokenizer.apply_chat_template(messages, tokenize=False)
