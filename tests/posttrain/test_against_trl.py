"""The losses and gradients of our trainer are those of TRL's own trainers, on the same model and the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from dpo_samples import config, pair
from transformers import AutoModelForCausalLM
from trl.experimental import cpo as trl_cpo
from trl.experimental import orpo as trl_orpo

from cordee import peek
from posttrain import cpo, dpo, kto, orpo
from posttrain.training import objectives

ROWS = 6
NOISE = 0.02


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose answers have many lengths."""
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [pair(n) for n in range(ROWS)]
    for n, row in enumerate(rows):
        row["chosen"][0]["content"] += " German" * (n % 3)
        row["rejected"][0]["content"] += " naschan libers" * (n % 4)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def moved(model: Any) -> Any:
    """A model whose weights are not those that it started from."""
    generator = torch.Generator().manual_seed(5)
    for weights in model.parameters():
        weights.data += NOISE * torch.randn(weights.shape, generator=generator).to(weights.device)
    return model


def keys(stage: Any, model: Path, file: Path, **trainer: Any) -> Any:
    given = config(model, file, lora=None, save_steps=[]).model_dump(mode="json")
    given["trainer"] = {"max_length": 128, "bf16": False} | trainer
    return stage.Config.model_validate(given)


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weights.grad.clone() for name, weights in model.named_parameters()}


def compare(ours: Any, batch: Any, theirs: Any, their_loss: Callable[[], torch.Tensor]) -> None:
    """Losses and gradients are the same."""
    for model in (ours.model, theirs):
        model.train().zero_grad()
    loss, expected = ours.compute_loss(ours.model, batch), their_loss()
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-7)
    found, wanted = gradients(ours.model), gradients(theirs)
    scale = max(float(one.abs().max()) for one in wanted.values())
    assert scale > 1e-4
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-4 * scale, msg=name)


class TrlPairs(trl.DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


@pytest.fixture(scope="module")
def both(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our trainer and TRL's, and a batch of each."""
    from cordee.stage import Context

    folder = tmp_path_factory.mktemp("both")
    (folder / "out").mkdir()
    context = Context(out=folder / "out", seed=3, events=folder / "events.jsonl")
    ours, _ = dpo.build(keys(dpo, model_folder, rows_file), context)
    data = [ours.train_dataset[at] for at in range(ROWS)]
    moved(ours.model)
    columns = {
        "prompt_ids": [row["answers"][0][0].tolist() for row in data],
        "chosen_ids": [row["answers"][0][1].tolist() for row in data],
        "rejected_ids": [row["answers"][1][1].tolist() for row in data],
    }
    settings = trl.DPOConfig(
        str(folder / "trl"), bf16=False, gradient_checkpointing=False, report_to="none", use_weighting=True,
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    theirs = TrlPairs(
        moved(opened(model_folder)), opened(model_folder), settings, train_dataset=Dataset.from_dict(columns),
        processing_class=ours.processing_class,
    )  # fmt: skip
    batch = theirs.data_collator([theirs.train_dataset[at] for at in range(ROWS)])
    return ours, ours._prepare_inputs(ours.data_collator(data)), theirs, theirs._prepare_inputs(batch)


CASES: list[dict[str, Any]] = [
    *({"loss_type": [name]} for name in peek.functions("posttrain.losses.dpo")),
    *({"loss_type": [name], "f_divergence_type": "js_divergence"} for name in ("sigmoid", "ipo", "exo_pair")),
    {"loss_type": ["robust"], "f_divergence_type": "forward_kl"},
    {"loss_type": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid"], "use_weighting": True},
    {"loss_type": ["apo_zero"], "use_weighting": True},
    {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4},
    {"loss_type": ["discopop"], "discopop_tau": 0.2, "beta": 0.7},
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: "-".join(map(str, given.values())))
def test_dpo(both: Any, given: dict[str, Any]) -> None:
    ours, batch, theirs, their_batch = both
    given = {
        "loss_weights": None,
        "ld_alpha": None,
        "use_weighting": False,
        "beta": 0.3,
        "label_smoothing": 0.1,
    } | given
    settings = SimpleNamespace(**vars(ours.args) | given)
    ours.objective, batch = objectives.dpo(settings), dict(batch)
    theirs.loss_types, theirs.loss_weights = (
        given["loss_type"],
        given["loss_weights"] or [1.0] * len(given["loss_type"]),
    )
    theirs.f_divergence_type = settings.f_divergence_type
    theirs.f_alpha_divergence_coef = settings.f_alpha_divergence_coef
    theirs.args.discopop_tau = settings.discopop_tau
    for name in ("ld_alpha", "use_weighting", "beta", "label_smoothing"):
        setattr(theirs, name, given[name])
    if given["ld_alpha"] is not None:  # the sums of the reference have the weights too
        chosen, rejected = theirs.compute_ref_log_probs(theirs.ref_model, their_batch)
        batch["reference"] = torch.cat([chosen, rejected])
    if given["use_weighting"]:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(ours.model, outputs=("log_probs", "entropy", "is_top1", "log_sum_sq_probs"))
    theirs._metrics["train"].clear()
    ours._metrics["train"].clear()
    compare(ours, batch, theirs.model, lambda: theirs._compute_loss(theirs.model, their_batch, False))
    figures = ours.means("train")
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "entropy",
                 "mean_token_accuracy"):  # fmt: skip
        assert figures[name] == pytest.approx(theirs._metrics["train"][name][-1], rel=1e-4, abs=1e-6), name


def learn(trainer: Any, batch: Any) -> None:
    """A few steps on all answers, after which the model says any of them rather than its reference does."""
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (-trainer.forward(trainer.model, trainer._prepare_inputs(batch)).log_probs.mean()).backward()
        optimizer.step()


class TrlAnswers(trl.KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(model_folder: Path, rows_file: Path, tmp_path: Path, context: Any, loss_type: str) -> None:
    given = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    ours, _ = kto.build(keys(kto, model_folder, rows_file, **given), context)
    data = [ours.train_dataset[at] for at in range(2 * ROWS)]
    learn(ours, ours.data_collator(data))
    columns = {
        "prompt_ids": [row["answers"][0][0].tolist() for row in data],
        "completion_ids": [row["answers"][0][1].tolist() for row in data],
        "label": [bool(row["label"]) for row in data],
    }
    if loss_type == "kto":
        columns["KL_completion_ids"] = [row["answers"][1][1].tolist() for row in data]
    settings = trl.KTOConfig(
        str(tmp_path / "trl"), bf16=False, gradient_checkpointing=False, report_to="none", **given,
        per_device_train_batch_size=len(data), use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    theirs = TrlAnswers(
        opened(model_folder), opened(model_folder), settings, train_dataset=Dataset.from_dict(columns),
        processing_class=ours.processing_class,
    )  # fmt: skip
    theirs.model.load_state_dict(ours.model.state_dict())
    their_batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[at] for at in range(len(data))]))
    batch = ours._prepare_inputs(ours.data_collator(data))
    compare(ours, batch, theirs.model, lambda: theirs._compute_loss(theirs.model, their_batch, False))
    figures = ours.means("train")
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy"]
    for name in [*names, *(["kl"] if loss_type == "kto" else [])]:
        assert figures[name] == pytest.approx(theirs._metrics["train"][name][-1], rel=1e-3, abs=1e-5), name
    if loss_type == "kto":
        assert figures["kl"] > 0.01


def separate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as TRL's experimental trainers have it."""
    found = {}
    for name in ("input_ids", "attention_mask"):
        found[f"chosen_{name}"], found[f"rejected_{name}"] = batch[name].chunk(2)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    found["chosen_labels"], found["rejected_labels"] = labels.chunk(2)
    return found


def experimental(kind: Any, ours: Any, settings: Any) -> Any:
    """TRL's trainer without its data, of which only the loss is wanted."""
    theirs = kind.__new__(kind)
    names = ("beta", "loss_type", "cpo_alpha", "simpo_gamma", "label_smoothing", "alpha")
    theirs.__dict__ |= {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    pad = ours.processing_class.pad_token_id
    theirs.__dict__ |= {"pad_token_id": pad, "padding_value": pad, "accelerator": ours.accelerator}
    theirs.__dict__ |= {"is_encoder_decoder": False, "aux_loss_enabled": False}
    return theirs


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "label_smoothing": 0.2, "cpo_alpha": 0.5, "beta": 0.4},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
        {"loss_type": "simpo", "label_smoothing": 0.1, "beta": 2.0},
        {"loss_type": "alphapo", "alpha": 0.1, "beta": 2.0},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_cpo(model_folder: Path, rows_file: Path, context: Any, given: dict[str, Any]) -> None:
    ours, _ = cpo.build(keys(cpo, model_folder, rows_file, **given), context)
    moved(ours.model)
    batch = ours._prepare_inputs(ours.data_collator([ours.train_dataset[at] for at in range(ROWS)]))
    theirs, model = experimental(trl_cpo.CPOTrainer, ours, ours.args), moved(opened(model_folder)).to(ours.args.device)
    compare(ours, batch, model, lambda: theirs.get_batch_loss_metrics(model, separate(batch))[0])
    figures, (_, expected) = ours.means("train"), theirs.get_batch_loss_metrics(model, separate(batch))
    names = ["rewards/chosen", "rewards/margins", "rewards/accuracies"]
    for name in [*names, *(["nll_loss"] if ours.args.cpo_alpha else [])]:
        assert figures[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_orpo(model_folder: Path, rows_file: Path, context: Any) -> None:
    ours, _ = orpo.build(keys(orpo, model_folder, rows_file, beta=0.4), context)
    moved(ours.model)
    batch = ours._prepare_inputs(ours.data_collator([ours.train_dataset[at] for at in range(ROWS)]))
    theirs, model = (
        experimental(trl_orpo.ORPOTrainer, ours, ours.args),
        moved(opened(model_folder)).to(ours.args.device),
    )
    compare(ours, batch, model, lambda: theirs.get_batch_loss_metrics(model, separate(batch))[0])
    figures, (_, expected) = ours.means("train"), theirs.get_batch_loss_metrics(model, separate(batch))
    for name in ("rewards/chosen", "rewards/margins", "nll_loss", "log_odds_ratio", "log_odds_chosen"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
