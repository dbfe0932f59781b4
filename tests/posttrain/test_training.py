"""Resume points: what was killed, damaged or stopped goes on, and ends in the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_samples import some_chats, write_parquet
from transformers import AutoModelForCausalLM

from cordee import files
from cordee.compute import resume
from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context
from posttrain import sft
from posttrain.training import skeleton, watch

STEPS, SHARD = 9, "shard-0-of-1.safetensors"


def keys(model_folder: Path, data: Path, **trainer: Any) -> dict[str, Any]:
    return {
        "model": str(model_folder),
        "data": [{"path": str(data)}],
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_steps": [2, 5],
        "resume_steps": 3,
        "trainer": {"packing": True, "max_length": 128, "max_steps": STEPS, "learning_rate": 1e-3, **trainer},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("data") / "messages.parquet", some_chats(40))


def at(folder: Path) -> Context:
    """A context with its own folders."""
    for name in ("out", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Context(out=folder / "out", seed=17, events=folder / "run" / "events.jsonl")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in files.walk(folder)}


@pytest.fixture(scope="module")
def whole(
    model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], dict[str, Any]]:
    """The files and metrics of a run that nothing interrupts."""
    context = at(tmp_path_factory.mktemp("whole"))
    metrics = sft.run(sft.Config.model_validate(keys(model_folder, data)), context)
    return content(context.out), metrics


class Killed(BaseException):
    """Ends a run in the middle, with whatever lies on the disk then."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, config: sft.Config, context: Context) -> None:
    """Run until a step has ended, and no further."""
    original = watch.Watch.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "on_step_end", dying)
        with pytest.raises(Killed):
            sft.run(config, context)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_run_that_was_killed_ends_in_the_same_files_and_metrics(
    model_folder: Path, data: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config, context = sft.Config.model_validate(keys(model_folder, data)), at(tmp_path)
    kill_at(monkeypatch, step, config, context)
    metrics = sft.run(config, context)
    assert (content(context.out), metrics) == whole
    resumed = [row["step"] for row in files.read_json_lines(context.events) if row["event"] == "resumed"]
    assert resumed == ([step // 3 * 3] if step >= 3 else [])


@pytest.mark.parametrize(
    "given",
    [
        {"lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}},
        {"trainer": {"optim": "adafactor", "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 2,
                     "lr_scheduler_kwargs": {"min_lr": 1e-5}}},
    ],
    ids=["dropout", "adafactor"],
)  # fmt: skip
def test_dropout_and_what_an_optimizer_and_a_schedule_count_go_on(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    told = keys(model_folder, data, **given.get("trainer", {})) | ({"lora": given["lora"]} if "lora" in given else {})
    config, one, two = sft.Config.model_validate(told), at(tmp_path / "whole"), at(tmp_path / "killed")
    metrics = sft.run(config, one)
    kill_at(monkeypatch, 5, config, two)
    assert sft.run(config, two) == metrics
    assert content(two.out) == content(one.out)


def test_a_run_that_goes_on_marks_resume_points_as_often_as_it_is_told_now(
    model_folder: Path, data: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, context = keys(model_folder, data), at(tmp_path)
    kill_at(monkeypatch, 5, sft.Config.model_validate(given | {"resume_steps": 4}), context)
    often = sft.Config.model_validate(given | {"resume_steps": 1})
    kill_at(monkeypatch, 7, often, context)
    point, problems = resume.newest(context.out / "resume")
    assert (point and point.step, problems) == (6, [])
    metrics = sft.run(often, context)
    assert (content(context.out), metrics) == whole


def test_steps_that_are_asked_for_are_published_as_models(whole) -> None:
    published = {name.rpartition("/")[0] for name in whole[0] if name.endswith("model.safetensors")}
    assert published == {"", "checkpoints/2", "checkpoints/5"}
    assert len({whole[0][f"{place}/model.safetensors".lstrip("/")] for place in published}) == 3
    assert "checkpoints/2/tokenizer.json" in whole[0]


def test_only_the_checkpoints_that_are_to_be_kept_are_left_wherever_it_was_killed(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys(model_folder, data) | {"save_steps": 2, "eval_steps": 2, "heldout": 0.2}
    given["keep_checkpoints"] = {"last": 1, "best": 1}
    config, one, two = sft.Config.model_validate(given), at(tmp_path / "whole"), at(tmp_path / "killed")
    metrics = sft.run(config, one)
    assert {path.name for path in (one.out / "checkpoints").iterdir()} == {"8"}, "the loss falls: the last is the best"
    kill_at(monkeypatch, 5, config, two)
    assert {path.name for path in (two.out / "checkpoints").iterdir()} == {"4"}
    assert (sft.run(config, two), content(two.out)) == (metrics, content(one.out))


@pytest.mark.parametrize(("save_steps", "trainer"), [([2, 10], {}), (10, {}), ([2, 11], {"max_steps": -1})])
def test_a_step_that_the_training_does_not_have_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, save_steps: Any, trainer: dict[str, Any]
) -> None:
    given = {**keys(model_folder, data, num_train_epochs=1, **trainer), "save_steps": save_steps}
    with pytest.raises(UserError, match=r"save_steps: 1[01] is not from 1 to the last step, \d"):
        sft.run(sft.Config.model_validate(given), at(tmp_path))


@pytest.mark.parametrize("damage", ["no mark", "broken mark", "changed byte", "missing file", "half written"])
def test_a_damaged_resume_point_is_deleted_and_the_one_before_is_used(
    model_folder: Path, data: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config, context = sft.Config.model_validate(keys(model_folder, data)), at(tmp_path)
    kill_at(monkeypatch, 7, config, context)
    newest = context.out / "resume" / "6"
    assert (newest / resume.STATE).exists()
    if damage == "no mark":
        (newest / resume.STATE).unlink()
    elif damage == "broken mark":
        (newest / resume.STATE).write_bytes(b"\xff")
    elif damage == "missing file":
        (newest / SHARD).unlink()
    elif damage == "changed byte":
        spoilt = bytearray((newest / SHARD).read_bytes())
        spoilt[-1] ^= 1
        (newest / SHARD).write_bytes(spoilt)
    else:
        (context.out / "resume" / "9").mkdir()
        (context.out / "resume" / "9" / SHARD).write_bytes(b"half")
    metrics = sft.run(config, context)
    assert (content(context.out), metrics) == whole
    resumed = [row["step"] for row in files.read_json_lines(context.events) if row["event"] == "resumed"]
    assert resumed[-1] == (6 if damage == "half written" else 3)


def test_a_run_killed_after_its_last_step_takes_no_step_more(
    model_folder: Path, data: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, context = sft.Config.model_validate(keys(model_folder, data)), at(tmp_path)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "publish", killed)
        with pytest.raises(Killed):
            sft.run(config, context)
    metrics = sft.run(config, context)
    assert (content(context.out), metrics) == whole


def test_a_stop_saves_and_the_next_run_goes_on_from_there(
    model_folder: Path, data: Path, tmp_path: Path, whole
) -> None:
    config, context = sft.Config.model_validate(keys(model_folder, data)), at(tmp_path)
    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped, match=f"stopped at step 1 of {STEPS}"):
        sft.run(config, context)
    assert resume.newest(context.out / "resume")[0].folder == context.out / "resume" / "1"
    (context.events.parent / "stop").unlink()
    metrics = sft.run(config, context)
    assert (content(context.out), metrics) == whole


def test_kill_minus_nine_in_a_real_process_loses_nothing(model_folder: Path, data: Path, tmp_path: Path, whole) -> None:
    context = at(tmp_path)
    job = {"config": keys(model_folder, data), "out": str(context.out), "seed": 17, "events": str(context.events)}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    threads = torch.get_num_threads()  # another number of threads adds in another order
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain.sft", "--job", str(tmp_path / "job.json")], env=environment
    )
    mark = context.out / "resume" / "3" / resume.STATE
    deadline = time.monotonic() + 240
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert mark.exists()
    metrics = sft.run(sft.Config.model_validate(keys(model_folder, data)), context)
    assert (content(context.out), metrics) == whole


def test_a_compiled_model_is_saved_and_resumed_under_its_own_names(
    model_folder: Path, data: Path, tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft.Config.model_validate(keys(model_folder, data, torch_compile=True, torch_compile_backend="eager"))
    context = at(tmp_path)
    kill_at(monkeypatch, 5, config, context)
    assert sft.run(config, context)["loss"] == pytest.approx(whole[1]["loss"], rel=1e-3)
    _, loading = AutoModelForCausalLM.from_pretrained(context.out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_metrics_have_a_line_of_every_so_many_steps_and_of_the_last(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    context = at(tmp_path)
    sft.run(sft.Config.model_validate(keys(model_folder, data)), context)
    assert [row["step"] for row in files.read_json_lines(context.out / "metrics.jsonl")] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_are_counted_and_not_estimated_from_epochs(
    model_folder: Path, data: Path, tmp_path: Path, *, packing: bool
) -> None:
    """transformers rounds a tenth of an epoch up to a whole one."""
    given = {**keys(model_folder, data, packing=packing, max_steps=1), "save_steps": []}
    config, context = sft.Config.model_validate(given), at(tmp_path)
    trainer, _ = sft.build(config, context)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False)]
    pad = trainer.processing_class.pad_token_id
    tokens = sum(int((batch["input_ids"] != pad).sum()) for batch in batches)
    loss_tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    metrics = sft.run(config, context)
    assert (metrics["tokens"], metrics["loss_tokens"]) == (tokens, loss_tokens)
    assert metrics["steps"] == 1
    assert files.read_json_lines(context.out / "metrics.jsonl")[-1]["tokens"] == metrics["tokens"]


def test_progress_names_loss_speed_and_time_left(model_folder: Path, data: Path, tmp_path: Path) -> None:
    context = at(tmp_path)
    sft.run(sft.Config.model_validate(keys(model_folder, data)), context)
    last = [row for row in files.read_json_lines(context.events) if row["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["unit"]) == (STEPS, STEPS, "steps")
    assert last["figures"]["tokens_per_s"] > 0
    assert last["figures"]["loss"] > 0


def test_a_loss_that_is_no_number_ends_the_run(model_folder: Path, data: Path, tmp_path: Path) -> None:
    given = keys(model_folder, data, learning_rate=1e30, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    with pytest.raises(Fault, match=r"(the loss is (nan|inf) at step|not finite)"):
        sft.run(sft.Config.model_validate(given), at(tmp_path))


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = skeleton.open_model

    def planted(config: Any) -> Any:
        model, tokenizer = opened(config)
        model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return model, tokenizer

    monkeypatch.setattr(skeleton, "open_model", planted)
    given, context = keys(model_folder, data, max_grad_norm=1.0) | {"resume_steps": 1, "save_steps": []}, at(tmp_path)
    with pytest.raises(Fault, match="the grad_norm is nan at step 1"):
        sft.run(sft.Config.model_validate(given), context)
    assert resume.newest(context.out / "resume") == (None, [])


def test_a_resume_on_other_token_ids_is_a_fault(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """As where the chat template writes the date, and the run goes on the next day."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    config, context = sft.Config.model_validate(keys(model, data)), at(tmp_path)
    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped):
        sft.run(config, context)
    (context.events.parent / "stop").unlink()
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- bos_token }}", "{{- bos_token + '2026-11-27' }}"))
    with pytest.raises(Fault, match=r"resume/data\.json: the data has other token ids than when this training began"):
        sft.run(config, context)


def test_a_run_killed_before_it_is_published_does_not_train_again(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, context = sft.Config.model_validate(keys(model_folder, data)), at(tmp_path)

    write = files.write_json

    def write_and_die(path: Path, value: Any) -> None:
        write(path, value)
        if path.name == "training.json":
            raise KeyboardInterrupt

    def never(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as planted:
        planted.setattr(files, "write_json", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            sft.run(config, context)
    assert (context.out / "resume").is_dir()
    written = {name: value for name, value in content(context.out).items() if not name.startswith("resume/")}
    monkeypatch.setattr(skeleton, "_train", never)
    assert sft.run(config, context)["steps"] == STEPS
    assert content(context.out) == written
    assert not (context.out / "resume").exists()


def test_processes_that_were_asked_for_and_do_not_run_are_a_fault(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    config = sft.Config.model_validate({**keys(model_folder, data), "launch": {"num_processes": 2}})
    with pytest.raises(Fault, match=r"launch\.num_processes: 2 processes were asked for, and 1 run"):
        sft.run(config, at(tmp_path))


def test_a_precision_that_only_the_launcher_was_told_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="mixed_precision: precision and compilation are the stage's own"):
        sft.run(sft.Config.model_validate(keys(model_folder, data)), at(tmp_path))


def test_a_sharding_that_was_asked_for_and_does_not_run_is_a_fault(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "fsdp.yaml"
    settings.write_text("{use_cpu: true, distributed_type: FSDP, fsdp_config: {fsdp_version: 2}}")
    config = sft.Config.model_validate({**keys(model_folder, data), "launch": {"config_file": str(settings)}})
    with pytest.raises(Fault, match="FSDP was asked for: True, and ApertusForCausalLM runs"):
        sft.run(config, at(tmp_path))


@pytest.mark.parametrize("processes", [2, 1])
def test_two_processes_that_were_stopped_go_on_in_any_number(
    model_folder: Path, data: Path, tmp_path: Path, processes: int
) -> None:
    context = at(tmp_path)
    told = {**keys(model_folder, data), "launch": {"num_processes": 2}, "per_device_train_batch_size": 2}
    job = {"config": told, "out": str(context.out), "seed": 17, "events": str(context.events)}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run() -> str:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={told['launch']['num_processes']}", "-m", "posttrain.sft"]
        command = [*launch, "--job", str(tmp_path / "job.json")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    stop = context.events.with_name("stop")
    stop.touch()
    assert "stopped at step 1" in run()
    stop.unlink()
    told["launch"]["num_processes"] = processes
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    said = run()
    assert (context.out / "training.json").exists(), said[-2000:]
    assert [row["step"] for row in files.read_json_lines(context.events) if row["event"] == "resumed"] == [1]


def test_no_line_before_a_point_can_be_lost_in_a_power_failure(
    model_folder: Path, data: Path, tmp_path: Path, unflushed: list[int]
) -> None:
    sft.run(sft.Config.model_validate(keys(model_folder, data)), at(tmp_path))
    assert unflushed == [0, 0]
