"""Distillation across vocabularies: groups of tokens by hand, TRL's own loss, and a training from another tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_samples
import pytest
import torch
from chat_samples import SPECIAL, TEXTS, some_chats, write_lines
from dpo_samples import metrics_of

from cordee.errors import UserError
from cordee.stage import Context
from posttrain import distill
from posttrain.training import vocabularies


def test_tokens_that_end_at_the_same_byte_are_a_group() -> None:
    """`un|break|able` against `unb|reak|able`: the second boundary alone is shared, then the end."""
    student, teacher = vocabularies.groups_of([2, 5, 4], [3, 4, 4])
    assert student.tolist() == [0, 0, 1]
    assert teacher.tolist() == [0, 0, 1]
    student, teacher = vocabularies.groups_of([1, 1, 1, 1], [2, 2])
    assert (student.tolist(), teacher.tolist()) == ([0, 0, 1, 1], [0, 1])


def test_the_distance_by_hand() -> None:
    """Sorted: 0.5 0.3 0.2 against 0.6 0.4: |0.5 - 0.6| + |0.3 - 0.4| + 0.2 = 0.4."""
    student = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    teacher = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    assert vocabularies.universal_logit_distance(student, teacher).item() == pytest.approx(0.4, abs=1e-12)
    assert vocabularies.universal_logit_distance(student, student.flip(-1)).item() == 0


def test_a_group_has_the_probability_of_the_tokens_before_its_last() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.7, 0.3]], dtype=torch.float64)
    ids, groups = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    found = vocabularies.group_probabilities(probabilities.log(), ids, groups)
    torch.testing.assert_close(found, torch.stack([0.5 * probabilities[1], probabilities[2]]))


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    ids, groups = torch.tensor([0, 1, 5, 2, 3]), torch.tensor([0, 0, 1, 2, 2])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return vocabularies.universal_logit_distance(
            vocabularies.group_probabilities(logits, ids, groups), teacher
        ).sum()

    assert torch.autograd.gradcheck(loss, student, eps=1e-6, atol=1e-7)


def test_trl_computes_the_same() -> None:
    """TRL's ULD loss of one row, by the chain rule (`bayesian`), is the mean over its groups."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True,
        uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    lengths = ([2, 5, 4, 1, 1], [3, 4, 4, 2])
    logits = [torch.randn(1, 3 + len(one), 7 + at, generator=generator) for at, one in enumerate(lengths)]
    ids = [torch.randint(0, 7, (1, 3 + len(one)), generator=generator) for one in lengths]
    labels, offsets = [], []
    for one, tokens in zip(ids, lengths, strict=True):
        labels.append(one.clone())
        labels[-1][0, :3] = -100
        ends = torch.tensor(tokens).cumsum(0)
        starts = ends - torch.tensor(tokens)
        offsets.append(torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.stack([starts, ends], 1)])[None])
    theirs = ULDLoss(config)(*logits, *labels, *ids, *offsets)
    groups = [torch.tensor([[-1] * 3 + one.tolist()]) for one in vocabularies.groups_of(*lengths)]
    batch = {"input_ids": ids[0], "teacher_ids": ids[1], "student_groups": groups[0], "teacher_groups": groups[1]}
    ours = vocabularies.distances(*logits, batch, 1.0)[0]
    last = [3 + 1, 3 + 2, 3 + 4]  # of each group
    assert groups[0][0, 3:].tolist() == [0, 0, 1, 2, 2]
    assert ours[last].mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours[:3].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def teacher(model_folder: Path, template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer of its own: the same text has fewer tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(reversed(SPECIAL)), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator([*TEXTS.values(), "Which language is this? German Romansh Ita"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() != AutoTokenizer.from_pretrained(model_folder).get_vocab()
    torch.manual_seed(4)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))
    model.lm_head.weight.data *= 40
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", some_chats(16))


def config(model: Path, teacher: Path, chats: Path, **changes: Any) -> distill.Config:
    """The same with a teacher of another vocabulary."""
    return distill_samples.config(model, teacher, chats, **{"across_vocabularies": True, **changes})


def test_a_student_learns_from_a_teacher_of_another_vocabulary(
    model_folder: Path, teacher: Path, chats: Path, new_context: Callable[[str], Context]
) -> None:
    first, second = new_context("one"), new_context("two")
    distill.run(config(model_folder, teacher, chats, heldout=0.25), first)
    rows = [row for row in metrics_of(first) if "heldout_divergence" in row]
    assert rows[-1]["heldout_divergence"] < 0.97 * rows[0]["heldout_divergence"]
    distill.run(config(model_folder, teacher, chats, heldout=0.25, per_device_train_batch_size=2), second)
    for one, two in zip(metrics_of(first), metrics_of(second), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


def test_rows_are_aligned_by_the_text_of_their_answers(
    model_folder: Path, teacher: Path, chats: Path, context: Context
) -> None:
    trainer, _ = distill.build(config(model_folder, teacher, chats), context)
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    tokenizers = [trainer.processing_class, __import__("transformers").AutoTokenizer.from_pretrained(teacher)]
    for row in range(4):
        sides = [(batch["input_ids"], batch["student_groups"]), (batch["teacher_ids"], batch["teacher_groups"])]
        texts = []
        for tokenizer, (ids, groups) in zip(tokenizers, sides, strict=True):
            own = groups[row]
            texts.append([tokenizer.decode(ids[row][own == group]) for group in range(int(own.max()) + 1)])
        assert texts[0] == texts[1]
        assert texts[0][-1] == "<|assistant_end|>"
        has_loss = batch["labels"][row] != -100
        assert ((batch["student_groups"][row] != -1) <= has_loss).all()


def test_a_template_that_writes_answers_otherwise_is_refused(
    model_folder: Path, teacher: Path, chats: Path, context: Context, tmp_path: Path
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    says = "{% if m.role == 'assistant' %}So: {% endif %}{{ m.content }}"
    turns = f"{{% for m in messages %}}<|{{{{ m.role }}}}_start|>{says}<|{{{{ m.role }}}}_end|>{{% endfor %}}"
    asks = "{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
    (other / "chat_template.jinja").write_text(turns + asks)
    with pytest.raises(UserError, match=r"an answer has other bytes in the teacher's chat template"):
        distill.run(config(model_folder, other, chats), context)


def test_a_tokenizer_that_is_not_byte_level_is_refused(
    model_folder: Path, teacher: Path, chats: Path, context: Context, tmp_path: Path
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    told["pre_tokenizer"], told["decoder"] = {"type": "Whitespace"}, None
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"other: teacher: its tokenizer is not byte-level"):
        distill.run(config(model_folder, other, chats), context)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"on_policy": 0.5}, "on_policy: is not for a teacher of another vocabulary"),
        ({"trainer": {"packing": True}}, "trainer.packing: is not for a teacher of another vocabulary"),
        ({"beta": 0.1}, "beta: is of distributions over one vocabulary"),
        ({"beta": 0.5}, "beta: is of distributions over one vocabulary"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(Path("a"), Path("b"), Path("c"), **keys)
    assert message in str(caught.value)


def test_a_config_is_read_again_as_it_was_written() -> None:
    """In job.json every key stands with its value, `beta` too."""
    asked = config(Path("a"), Path("b"), Path("c"))
    assert distill.Config.model_validate(asked.model_dump(mode="json")) == asked
