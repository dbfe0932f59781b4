"""KTO, ORPO, CPO and QRPO through their stages: they learn what they are for, and refuse what would teach nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_samples import METHODS, keys_of, stage_of, write_rows

from cordee import files, peek
from cordee.config import libraries
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import cpo, kto, orpo, qrpo
from posttrain.training import checks

NewContext = Callable[[str], Context]
ADAPTER = {"lora": {"r": 4, "lora_alpha": 8}, "per_device_train_batch_size": 4}
LEARNING = {"max_steps": 8, "learning_rate": 1e-2, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def lines(context: Context) -> list[dict[str, float]]:
    return [row for row in files.read_json_lines(context.out / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_learns_what_the_method_is_for(
    model_folder: Path, rows: Path, context: Context, method: str
) -> None:
    stage = stage_of(method)
    given = keys_of(method, model_folder, rows, trainer=LEARNING, **ADAPTER)
    metrics = stage.run(stage.Config.model_validate(given), context)
    first, *_, last = lines(context)
    assert last["loss"] < first["loss"]
    if stage is qrpo:
        assert first["rewards"] == pytest.approx(0, abs=1e-5)
        assert last["loss"] < 0.8 * first["loss"]
    else:
        assert last["rewards/margins"] > first["rewards/margins"]
    if stage in (kto,):
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert metrics["answers" if stage in (kto, qrpo) else "pairs"] == 8 * 8
    assert (context.out / "adapter_config.json").is_file()
    assert not (context.out / "resume").exists()


def single(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {n}", **row}) + "\n" for n, row in enumerate(rows)))
    return path


def test_kto_needs_answers_of_both_kinds(model_folder: Path, tmp_path: Path, new_context: NewContext) -> None:
    for label, message in ((True, "good: `label` is true.*posttrain.sft trains on good"), (False, "bad: `label`")):
        file = single(tmp_path / "a.jsonl", *({"completion": "yes", "label": label} for _ in range(8)))
        asked = kto.Config.model_validate(keys_of("kto", model_folder, file))
        with pytest.raises(UserError, match=f"data: all 8 answers are {message}"):
            kto.run(asked, new_context(str(label)))


def test_kto_learns_from_single_answers(model_folder: Path, tmp_path: Path, context: Context) -> None:
    file = single(
        tmp_path / "a.jsonl",
        *({"completion": ("good answer", "bad")[n % 3 > 0], "label": n % 3 == 0} for n in range(24)),
    )
    asked = keys_of("kto", model_folder, file, trainer=LEARNING, **ADAPTER)
    kto.run(kto.Config.model_validate(asked), context)
    first, *_, last = lines(context)
    assert last["rewards/chosen"] > first["rewards/chosen"]
    assert last["rewards/rejected"] < first["rewards/rejected"]
    assert first["kl"] == 0


@pytest.mark.parametrize(
    ("stage", "trainer", "message"),
    [
        (kto, {"loss_type": "ktoo"}, r"trainer\.loss_type: .*'ktoo'.*did you mean 'kto'"),
        (kto, {"desirable_weight": 0.0}, r"trainer\.desirable_weight: must be above 0"),
        (cpo, {"loss_type": "sigmod"}, r"trainer\.loss_type: .*did you mean 'sigmoid'"),
        (cpo, {"simpo_gamma": 0.3}, r"trainer\.simpo_gamma: sigmoid does not read it"),
        (cpo, {"loss_type": "hinge", "label_smoothing": 0.1}, r"trainer\.label_smoothing: hinge does not read it"),
        (cpo, {"cpo_alpha": -1.0}, r"trainer\.cpo_alpha: must be at least 0"),
        (cpo, {"loss_type": "alphapo", "cpo_alpha": 1.0}, r"trainer\.cpo_alpha: alphapo sets it to 0"),
        (orpo, {"beta": 0.0}, r"trainer\.beta: must be above 0"),
        (orpo, {"train_sampling_strategy": "group_by_length"}, r"train_sampling_strategy: 'group_by_length' is not"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(
    model_folder: Path, rows: Path, context: Context, stage: Any, trainer: dict[str, Any], message: str
) -> None:
    name = stage.__name__.rpartition(".")[2]
    given = keys_of(name, model_folder, rows)
    given["trainer"] = {name: value for name, value in given["trainer"].items() if name != "beta"} | trainer
    with pytest.raises(UserError, match=message):
        stage.run(stage.Config.model_validate(given), context)


def test_qrpo_needs_rewards_that_differ_and_enough_references(
    model_folder: Path, tmp_path: Path, new_context: NewContext
) -> None:
    def of(rewards: list[float], references: list[float], **keys: Any) -> qrpo.Config:
        answers = [{"completion": "yes", "reward": reward, "reference_rewards": references} for reward in rewards]
        return qrpo.Config.model_validate(keys_of("qrpo", model_folder, single(tmp_path / "a.jsonl", *answers)) | keys)

    with pytest.raises(UserError, match="data: all 8 answers have the same reward"):
        qrpo.run(of([1.0] * 8, [0.0, 1.0, 2.0]), new_context("same"))
    with pytest.raises(UserError, match=r"transform: normal_icdf needs 3 rewards .* a row has 2"):
        qrpo.run(of([1.0, 2.0] * 4, [0.0, 1.0], transform="normal_icdf"), new_context("few"))
    with pytest.raises(UserError, match=r"transform: no transform 'logs'; did you mean 'log'"):
        of([1.0], [0.0], transform="logs")
    assert qrpo.run(of([1.0, 2.0] * 4, [0.0, 1.0, 3.0], transform="normal_icdf"), new_context("enough"))["steps"] == 3


def test_a_beta_that_would_be_cut_for_every_answer_is_refused() -> None:
    keys = {"model": "m", "data": [{"path": "a"}], "beta": 0.5}
    with pytest.raises(UserError, match=r"beta: 0\.5 would be cut to beta_max=0\.1 for every answer; raise beta_max"):
        qrpo.Config.model_validate(keys)
    for more in ({"beta_max": 0.5}, {"beta_max": None}, {"length_normalization": True}):
        assert qrpo.Config.model_validate(keys | more).beta == 0.5


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "cpo", "qrpo", "reward", "grpo"])
def test_answers_that_stand_in_a_prompt_are_never_trained(name: str) -> None:
    keys = {"model": "m", "data": [{"path": "a"}], "earlier_answers": "skip"}
    with pytest.raises(UserError, match="earlier_answers: is for chats"):
        stage_of(name).Config.model_validate(keys)
    assert stage_of("sft").Config.model_validate(keys).earlier_answers == "skip"


def test_rows_without_a_reward_are_counted(model_folder: Path, tmp_path: Path, new_context: NewContext) -> None:
    answers = [{"completion": "yes", "reward": n, "reference_rewards": [0.0, 3.0, 5.0]} for n in range(9)]
    file = single(tmp_path / "a.jsonl", *answers, {"completion": "yes", "reward": None, "reference_rewards": [1.0]})
    given = keys_of("qrpo", model_folder, file)
    with pytest.raises(UserError, match=r"a\.jsonl: row 10: has no reward"):
        qrpo.run(qrpo.Config.model_validate(given), new_context("error"))
    dropped = qrpo.run(qrpo.Config.model_validate(given | {"bad_rows": "drop"}), new_context("drop"))
    assert (dropped["rows"], dropped["rows_left_out"]) == (9, 1)


def test_costs_count_what_is_only_read(model_folder: Path, tmp_path: Path) -> None:
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.0.path": Cost(rows=100, tokens=1000.0)}
    trainer = {"num_train_epochs": 2, "max_steps": -1}

    def flops(method: str, **more: Any) -> float:
        stage = stage_of(method)
        keys = keys_of(method, model_folder, tmp_path / "later.jsonl", trainer=trainer | more)
        return stage.cost(stage.Config.model_validate(keys), given).flops

    plain = flops("orpo")
    assert flops("cpo") == plain
    assert flops("dpo") / plain == pytest.approx((2 + 2 / 6) / 2)
    answers = plain / 2
    assert flops("qrpo") / answers == pytest.approx((2 + 2 / 6) / 2)
    assert flops("kto apo_zero_unpaired") == pytest.approx(flops("qrpo"))
    # the reference twice once, and the model a forward more in both epochs
    assert flops("kto") / answers == pytest.approx((2 + 2 * 2 / 6 + 2 * 2 / 6) / 2)


HONOURED = {
    "trl.DPOConfig": {
        *("loss_type", "loss_weights", "beta", "ld_alpha", "use_weighting", "label_smoothing", "discopop_tau"),
        *("f_divergence_type", "f_alpha_divergence_coef", "activation_offloading", "disable_dropout", "max_length"),
        *("model_init_kwargs", "pad_to_multiple_of", "router_aux_loss_coef"),
    },
    "trl.KTOConfig": {
        *("loss_type", "beta", "desirable_weight", "undesirable_weight", "activation_offloading", "disable_dropout"),
        *("max_length", "model_init_kwargs", "pad_to_multiple_of", "router_aux_loss_coef"),
    },
    "trl.experimental.orpo.ORPOConfig": {"beta", "disable_dropout", "max_length", "model_init_kwargs"},
    "trl.experimental.cpo.CPOConfig": {
        *("loss_type", "beta", "cpo_alpha", "simpo_gamma", "alpha", "label_smoothing", "disable_dropout"),
        *("max_length", "model_init_kwargs"),
    },
}
"""TRL's own fields, which this trainer reads; all others are the stage's."""


@pytest.mark.parametrize("stage", [stage_of("dpo"), kto, orpo, cpo])
def test_every_field_of_trls_own_is_honoured_or_refused(stage: Any) -> None:
    mark = dict(libraries(stage.Config))["trainer"]
    own = (
        peek.dataclass_fields(mark.dataclass_name).keys()
        - peek.dataclass_fields("transformers.TrainingArguments").keys()
    )
    assert own - mark.owned.keys() == HONOURED[mark.dataclass_name]


def test_qrpo_takes_no_field_of_a_loss_of_dpo() -> None:
    mark = dict(libraries(qrpo.Config))["trainer"]
    own = (
        peek.dataclass_fields(mark.dataclass_name).keys()
        - peek.dataclass_fields("transformers.TrainingArguments").keys()
    )
    left = {"activation_offloading", "disable_dropout", "max_length", "model_init_kwargs", "pad_to_multiple_of"}
    assert own - mark.owned.keys() == left | {"router_aux_loss_coef"}


def test_the_losses_that_checks_know_are_there() -> None:
    assert checks.names("kto") == ["kto", "apo_zero_unpaired"]
    assert checks.names("cpo") == ["sigmoid", "hinge", "ipo", "simpo"]
    assert len(checks.names("dpo")) == 15
