"""Distillation through the stage: a student learns a teacher's distributions, on data and on its own answers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_samples import some_chats, write_lines
from distill_samples import config
from dpo_samples import metrics_of
from stopping import StopsAfter
from torch.distributed._tools.mem_tracker import MemTracker

from cordee.chat.source import Limits
from cordee.compute.model import open_model
from cordee.cost import Cost
from cordee.errors import Stopped, UserError
from cordee.seeds import seed_of
from cordee.stage import Context
from posttrain import distill
from posttrain.training import distill_trainer, divergence, sampling
from posttrain.training.settings import IGNORED

LONG = pytest.mark.long
ROWS = 6
"""Packed rows of 128 tokens that the 16 chats make."""


@pytest.fixture(scope="module")
def teacher(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider and deeper model of the same vocabulary, sure of what it says."""
    from transformers import ApertusConfig, ApertusForCausalLM

    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("teacher") / "teacher")
    told = json.loads((folder / "config.json").read_text())
    torch.manual_seed(5)
    config = ApertusConfig.from_dict(told | {"hidden_size": 96, "num_hidden_layers": 3, "initializer_range": 0.2})
    model = ApertusForCausalLM(config)
    model.lm_head.weight.data *= 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", some_chats(16))


@pytest.mark.parametrize(
    ("keys", "at_most"),  # an adapter leaves the head as it is, and the teacher's is another
    [({"beta": 0.0}, 0.9), ({"lora": {"r": 8}}, 0.99), ({"beta": 1.0, "cross_entropy": 0.2}, 0.9)],
)
def test_the_student_comes_closer_to_its_teacher(
    model_folder: Path, teacher: Path, chats: Path, context: Context, keys: dict[str, Any], at_most: float
) -> None:
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    metrics = distill.run(config(model_folder, teacher, chats, heldout=0.25, **keys), context)
    rows = metrics_of(context)
    first, *_, last = [row for row in rows if "heldout_divergence" in row]
    assert last["heldout_divergence"] < at_most * first["heldout_divergence"]
    trained = [row for row in rows if "loss" in row]
    for row in trained:
        weight = keys.get("cross_entropy", 0.0)
        expected = (1 - weight) * row["divergence"] + weight * row["cross_entropy"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["loss_tokens"] > 0
    assert metrics["steps"] == len(trained)
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert (context.out / ("adapter_config.json" if "lora" in keys else "config.json")).exists()


def test_the_loss_is_the_mean_over_answer_tokens_in_float64(
    model_folder: Path, teacher: Path, chats: Path, context: Context
) -> None:
    """Both models in float64, chat by chat; one division by the number of tokens with loss."""
    import encoding
    from transformers import AutoTokenizer

    asked = config(model_folder, teacher, chats, global_batch_size=16, trainer={"max_steps": 1})
    found = distill.run(asked, context)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    models = [open_model(folder).double().eval() for folder in (model_folder, teacher)]
    total, count = 0.0, 0
    for row in encoding.chats(chats, tokenizer, Limits(128, 512, len(tokenizer))):
        ids = torch.tensor(row.ids, dtype=torch.long)
        with torch.no_grad():
            q, p = (model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1) for model in models)
        for place in range(row.answers[0].first, row.answers[0].until):
            one, other = p[place - 1].exp(), q[place - 1].exp()
            mixture = (one + other) / 2
            total += float(0.5 * (one * (one / mixture).log()).sum() + 0.5 * (other * (other / mixture).log()).sum())
            count += 1
    assert metrics_of(context)[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["loss_tokens"] == count


@pytest.mark.parametrize("per_device", [1, pytest.param(2, marks=LONG), pytest.param(8, marks=LONG)])
def test_a_step_does_not_depend_on_how_its_rows_are_batched(
    model_folder: Path, teacher: Path, chats: Path, new_context: Callable[[str], Context], per_device: int
) -> None:
    """Of on-policy steps too: each row is sampled by a seed of its own."""
    whole, split = new_context("whole"), new_context("split")
    keys = {"on_policy": 0.5, "trainer": {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}}
    distill.run(config(model_folder, teacher, chats, **keys), whole)
    distill.run(config(model_folder, teacher, chats, **keys, per_device_train_batch_size=per_device), split)
    for one, other in zip(metrics_of(whole), metrics_of(split), strict=True):
        for name in ("loss", "grad_norm", "divergence", "cross_entropy", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=2e-4), name
        assert one["tokens"] == other["tokens"]


def test_packed_chats_give_the_same_loss(
    model_folder: Path, teacher: Path, chats: Path, new_context: Callable[[str], Context]
) -> None:
    plain, packed = new_context("plain"), new_context("packed")
    distill.run(config(model_folder, teacher, chats, global_batch_size=16, trainer={"max_steps": 1}), plain)
    asked = config(
        model_folder, teacher, chats, global_batch_size=ROWS, per_device_train_batch_size=1,
        trainer={"max_steps": 1, "packing": True},
    )  # fmt: skip
    assert distill.run(asked, packed)["packed_rows"] == ROWS
    assert metrics_of(packed)[0]["loss"] == pytest.approx(metrics_of(plain)[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("on_policy", [pytest.param(0.0, marks=LONG), 0.5, pytest.param(1.0, marks=LONG)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    model_folder: Path, teacher: Path, chats: Path, new_context: Callable[[str], Context], on_policy: float
) -> None:
    whole, broken = new_context("whole"), new_context("broken")
    asked = config(model_folder, teacher, chats, on_policy=on_policy, save_steps=[5])
    distill.run(asked, whole)
    with pytest.raises(Stopped, match="step 3 of 6"):
        distill.run(asked, StopsAfter(broken.out, broken.seed, broken.events))
    torch.manual_seed(1234)  # whatever the process has drawn before
    distill.run(asked, broken)
    for name in ("model.safetensors", "checkpoints/5/model.safetensors", "config.json"):
        assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes(), name
    assert metrics_of(whole) == metrics_of(broken)


def test_on_policy_rows_are_the_prompts_with_what_the_student_says(
    model_folder: Path, teacher: Path, chats: Path, context: Context
) -> None:
    """Loss on the completion alone, up to the token that ends it; the tokens are those that the student samples."""
    asked = config(model_folder, teacher, chats, on_policy=1.0)
    trainer, _ = distill.build(asked, context)
    rows = [trainer.train_dataset[at] for at in range(8)]
    given = [trainer.data_collator(rows[at : at + 4]) for at in (0, 4)]
    batches, count = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert int(count) == sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    assert len({tuple(row) for batch in batches for row in batch["labels"].tolist()}) == 8
    stops = set(trainer.settings.stops)
    for number, (before, after) in enumerate(zip(given, batches, strict=True)):
        for row in range(4):
            prompt = distill_trainer.prompt(before["input_ids"][row], before["labels"][row])
            ids, labels = after["input_ids"][row].tolist(), after["labels"][row].tolist()
            assert ids[: len(prompt)] == prompt
            assert labels[: len(prompt)] == [IGNORED] * len(prompt)
            said = [token for token in labels if token != IGNORED]
            assert ids[len(prompt) : len(prompt) + len(said)] == said
            assert 1 <= len(said) <= 8
            assert not stops.intersection(said[:-1])
            assert len(said) == 8 or said[-1] in stops
            (alone,) = sampling.sample(
                trainer.model, [prompt], [seed_of(context.seed, 0, 4 * number + row)], trainer.settings.stops,
                trainer.processing_class.pad_token_id, sampling.SamplingSettings(1.0, 8),
            )  # fmt: skip
            assert alone.ids == said


def test_which_steps_are_on_policy_is_drawn_by_the_seed() -> None:
    def settings(share: float, seed: int = 0) -> distill_trainer.DistillSettings:
        return distill_trainer.DistillSettings(0.5, 1.0, 0.0, share, 8, 1.0, (1,), seed)

    drawn = [distill_trainer.is_on_policy(settings(0.3), step) for step in range(1000)]
    assert 250 < sum(drawn) < 350
    assert drawn == [distill_trainer.is_on_policy(settings(0.3), step) for step in range(1000)]
    assert drawn != [distill_trainer.is_on_policy(settings(0.3, seed=1), step) for step in range(1000)]
    assert all(distill_trainer.is_on_policy(settings(1.0), step) for step in range(100))
    assert not any(distill_trainer.is_on_policy(settings(0.0), step) for step in range(100))


def test_a_student_that_is_its_own_teacher_is_at_0(model_folder: Path, chats: Path, context: Context) -> None:
    distill.run(config(model_folder, model_folder, chats, trainer={"max_steps": 1}), context)
    assert metrics_of(context)[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert metrics_of(context)[0]["grad_norm"] == pytest.approx(0, abs=1e-4)


def test_a_teacher_with_a_longer_padded_table_is_cut(
    model_folder: Path, teacher: Path, chats: Path, new_context: Callable[[str], Context], tmp_path: Path
) -> None:
    """As Qwen's sizes differ in rows that stand for no token."""
    padded = shutil.copytree(teacher, tmp_path / "padded")
    model = open_model(teacher)
    model.resize_token_embeddings(model.config.vocab_size + 24, mean_resizing=False)
    model.save_pretrained(padded)
    plain, other = new_context("plain"), new_context("other")
    distill.run(config(model_folder, teacher, chats, trainer={"max_steps": 2}), plain)
    distill.run(config(model_folder, padded, chats, trainer={"max_steps": 2}), other)
    assert metrics_of(plain)[1]["loss"] == pytest.approx(metrics_of(other)[1]["loss"], rel=1e-5)


def test_a_teacher_of_another_vocabulary_is_refused(
    model_folder: Path, teacher: Path, chats: Path, context: Context, tmp_path: Path
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    one, two = sorted(vocabulary)[50:52]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"other: teacher: its vocabulary is not the student's: 2 tokens differ.*gold"):
        distill.run(config(model_folder, other, chats), context)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"on_policy": 0.5, "trainer": {"packing": True}}, "trainer.packing: is for data that are given"),
        ({"max_new_tokens": 64}, "max_new_tokens: is for on_policy above 0"),
        ({"sampling_temperature": 0.7}, "sampling_temperature: is for on_policy above 0"),
        ({"on_policy": 0.5, "max_new_tokens": 500}, "max_new_tokens: the longest prompt has"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(
    model_folder: Path, teacher: Path, chats: Path, context: Context, keys: dict[str, Any], message: str
) -> None:
    def asked() -> None:
        distill.run(config(model_folder, teacher, chats, **keys), context)

    with pytest.raises(UserError) as caught:
        asked()
    assert message in str(caught.value)


def test_a_text_without_a_prompt_can_not_be_asked(
    model_folder: Path, teacher: Path, context: Context, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "A text without a prompt."}\n' * 2)
    with pytest.raises(UserError, match=r"texts\.jsonl: on_policy: row 1 is a text without a prompt"):
        distill.run(config(model_folder, teacher, tmp_path / "texts.jsonl", on_policy=0.1), context)


def test_the_cost_has_the_teachers_passes_and_weights_and_all_logits(
    model_folder: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    """The teacher's weights are as they are stored; of one that is not made yet, in float32."""
    given = {"model": Cost(parameters=1e6, vocab_size=400), "teacher": Cost(parameters=7e6)}
    asked = config(model_folder, teacher, chats)
    found, plain = distill.cost(asked, given), distill.cost(asked, {**given, "teacher": Cost(parameters=0)})
    assert found.flops - plain.flops == pytest.approx(2 * 7e6 * found.tokens)
    assert found.memory.frozen == (teacher / "model.safetensors").stat().st_size
    assert found.memory.logits == 4 * 128 * found.decoder.vocab_size * 49
    assert found.memory_bytes == found.memory.total
    assert distill.cost(config(model_folder, tmp_path / "later", chats), given).memory.frozen == 28e6
    half = shutil.copytree(teacher, tmp_path / "half")
    open_model(teacher, dtype=torch.bfloat16).save_pretrained(half)
    stored = distill.cost(config(model_folder, half, chats), {}).memory.frozen
    assert stored == pytest.approx(found.memory.frozen / 2, rel=0.02)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("beta", "weight"), [(0.0, 0.0), (0.0, 0.3), (0.5, 0.0), (0.5, 0.3), (1.0, 0.0), (1.0, 0.3)])
def test_the_logits_bytes_are_what_torch_counts(
    model_folder: Path, teacher: Path, chats: Path, half: bool, beta: float, weight: float
) -> None:
    """Within 5 %, of the loss of 256 tokens and a vocabulary of 2000, and its backward pass."""
    tokens, vocabulary = 256, 2000
    hidden = torch.randn(tokens, 16, requires_grad=True)
    student, other = (torch.nn.Linear(16, vocabulary, bias=False) for _ in range(2))
    tracker = MemTracker()
    tracker.track_external(student, other)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            mask = torch.ones(1, tokens, dtype=torch.bool)
            with torch.no_grad():
                theirs = other(hidden)[None][mask]
            losses, _ = divergence.mixed(
                student(hidden)[None][mask], theirs, torch.zeros(tokens, dtype=torch.long), beta=beta,
                temperature=1.0, cross_entropy_weight=weight,
            )  # fmt: skip
        losses.sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - 3 * student.weight.nbytes
    told = distill.logit_bytes(
        config(model_folder, teacher, chats, beta=beta, cross_entropy=weight, trainer={"bf16": half})
    )
    assert told == pytest.approx(peak / (tokens * vocabulary), rel=0.05)


@LONG
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need a GPU each")
def test_two_processes_train_as_one(
    model_folder: Path, teacher: Path, chats: Path, tmp_path: Path, new_context: Callable[[str], Context]
) -> None:
    """On-policy too: a row's completion is drawn by its place in the step, in whichever process it lies."""
    one, two = new_context("one"), new_context("two")
    asked = config(model_folder, teacher, chats, on_policy=0.5)
    distill.run(asked, one)
    keys = {**asked.model_dump(mode="json"), "launch": {"num_processes": 2}}
    job = {"out": str(two.out), "seed": two.seed, "events": str(two.events), "config": keys}
    (tmp_path / "job.json").write_text(json.dumps(job))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    ended = subprocess.run(
        [*launch, "--rdzv-endpoint=localhost:0", "-m", "posttrain.distill", "--job", str(tmp_path / "job.json")],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    for alone, together in zip(metrics_of(one), metrics_of(two), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=2e-3)
        assert together["tokens"] == alone["tokens"]
