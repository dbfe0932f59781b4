"""What was answered before is not asked again: after a stop, in another recipe, and only of the same weights."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cordee.errors import Stopped, UserError
from cordee.stage import CACHE, Context

TASKS = Path(__file__).resolve().parents[2] / "examples" / "udhr" / "tasks"
PLAIN = {"engine": "transformers", "max_length": 256}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that the stages of all recipes share."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def notes(context):
    return [json.loads(line)["text"] for line in context.events.read_text().splitlines() if '"note"' in line]


def context_of(folder, kind=Context):
    (folder / "out").mkdir(parents=True)
    return kind(out=folder / "out", seed=3, events=folder / "events.jsonl")


def settings(models, held_out, rolling=(), **changes):
    from eval import benchmark

    tasks = [str(TASKS / "language_choice.yaml"), str(TASKS / "language_answer.yaml"), *map(str, rolling)]
    given = {"models": {name: str(path) for name, path in models.items()}, "tasks": tasks}
    return benchmark.Config.model_validate(
        given | {"data": {k: str(v) for k, v in held_out.items()}, **PLAIN, **changes}
    )


def figures(context):
    models = json.loads((context.out / "results.json").read_text())["models"]
    return [{key: value for key, value in row.items() if key not in ("seconds", "commands")} for row in models]


def test_a_benchmark_that_was_stopped_within_a_task_goes_on_there(checkpoints, held_out, rolling, tmp_path):
    from eval import benchmark

    config = settings(checkpoints, held_out, [rolling])
    asked = []

    class Stopping(Context):
        def progress(self, *_, requests):
            asked.append(requests)

        def stop_requested(self):
            return len(asked) == 6

    with pytest.raises(Stopped, match="stopped at model 0 of 2; the next run continues from there"):
        benchmark.run(config, context_of(tmp_path / "stopped", Stopping))
    benchmark.run(config, again := context_of(tmp_path / "again"))
    (said,) = [note for note in notes(again) if "answered earlier" in note]
    count = int(said.split()[1])
    assert said.startswith("first: ")
    assert 0 < count < 6

    shutil.rmtree(tmp_path / "cache")
    benchmark.run(config, whole := context_of(tmp_path / "whole"))
    assert not any("answered earlier" in note for note in notes(whole))
    assert figures(again) == figures(whole)


def test_what_another_recipe_has_measured_needs_no_engine(checkpoints, held_out, rolling, cache, monkeypatch, tmp_path):
    from eval import benchmark
    from eval.measuring import backends

    config = settings(checkpoints, held_out, [rolling])
    benchmark.run(config, first := context_of(tmp_path / "first"))
    for folder in (cache / "answers").iterdir():
        os.utime(folder, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(backends.Models, "open", lambda *_: pytest.fail("an engine was started"))
        benchmark.run(config, second := context_of(tmp_path / "second"))
        benchmark.run(settings({"renamed": checkpoints["second"]}, held_out, limit=1), context_of(tmp_path / "fewer"))
    assert figures(second) == figures(first)
    assert all(folder.stat().st_mtime for folder in (cache / "answers").iterdir()), "in use, for `cordee clean`"
    assert len([note for note in notes(second) if "answered earlier" in note]) == 2


def test_other_weights_settings_and_engines_are_asked_anew(checkpoints, held_out, tmp_path):
    from safetensors.torch import load_file, save_file

    from eval import benchmark

    model = tmp_path / "model"
    shutil.copytree(checkpoints["first"], model)
    benchmark.run(settings({"m": model}, held_out), before := context_of(tmp_path / "before"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = -weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    benchmark.run(settings({"m": model}, held_out), changed := context_of(tmp_path / "changed"))
    benchmark.run(settings({"m": model}, held_out, batch_size=4), batched := context_of(tmp_path / "batched"))
    for context in (before, changed, batched):
        assert not any("answered earlier" in note for note in notes(context))
    assert figures(changed) != figures(before)


def test_other_packages_are_asked_anew(checkpoints, monkeypatch):
    from cordee.compute.engine import Settings
    from eval.measuring import answers

    def key():
        return answers.key_of(checkpoints["first"], Settings("vllm"), 1)

    before, installed = key(), answers.version
    assert key() == before
    for package in ("lm_eval", "torch", "transformers"):
        monkeypatch.setattr(answers, "version", lambda name, other=package: "9" if name == other else installed(name))
        assert key() != before


def test_a_line_that_was_cut_off_or_damaged_is_asked_again(checkpoints, held_out, cache, tmp_path):
    from eval import benchmark

    config = settings({"first": checkpoints["first"]}, held_out)
    benchmark.run(config, whole := context_of(tmp_path / "whole"))
    (kept,) = (cache / "answers").glob("*/*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    damaged = lines[3].replace(b"true", b"tRue") if b"true" in lines[3] else lines[3].replace(b"false", b"fAlse")
    for number, content in enumerate(([*lines[:-1], lines[-1][:-9]], [*lines[:3], damaged, *lines[4:]])):
        kept.write_bytes(b"".join(content))
        for other in set((cache / "answers").glob("*/*.jsonl")) - {kept}:
            other.unlink()
        benchmark.run(config, again := context_of(tmp_path / f"again-{number}"))
        (said,) = [note for note in notes(again) if "answered earlier" in note]
        assert int(said.split()[1]) == (len(lines) - 2, 2)[number]
        assert figures(again) == figures(whole)


def test_samples_of_the_same_prompt_stay_apart(checkpoints, held_out, tmp_path):
    """A task that asks each question three times has three answers, and the same three when it is asked again."""
    from eval import benchmark

    (tmp_path / "three.yaml").write_text(
        "task: three\ndataset_path: json\ndataset_kwargs: {data_files: {test: language}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\nrepeats: 3\n'
        "generation_kwargs: {do_sample: true, temperature: 1.5, max_gen_toks: 8, until: []}\n"
        "filter_list: [{name: all, filter: [{function: take_first_k, k: 3}]}]\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    config = settings({"first": checkpoints["first"]}, held_out, tasks=[str(tmp_path / "three.yaml")], limit=3)
    texts = []
    for name in ("one", "two"):
        benchmark.run(config, context := context_of(tmp_path / name))
        (file,) = (context.out / "lm_eval").rglob("samples_three_*.jsonl")
        texts.append([json.loads(line)["resps"][0] for line in file.read_text().splitlines()])
    assert texts[0] == texts[1]
    assert all(len(set(answers)) > 1 for answers in texts[0])


def test_a_further_sample_of_a_prompt_is_drawn_anew(checkpoints, held_out, tmp_path):
    """Its engine starts with the seed of the first sample: alone, it would say the same."""
    from eval import benchmark

    task = tmp_path / "samples.yaml"
    texts = []
    for count in (1, 2):
        task.write_text(
            "task: samples\ndataset_path: json\ndataset_kwargs: {data_files: {test: language}}\ntest_split: test\n"
            'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n'
            f"repeats: {count}\nfilter_list: [{{name: all, filter: [{{function: take_first_k, k: {count}}}]}}]\n"
            "generation_kwargs: {do_sample: true, temperature: 1.5, max_gen_toks: 8, until: []}\n"
            "metric_list: [{metric: exact_match}]\n"
        )
        config = settings({"first": checkpoints["first"]}, held_out, tasks=[str(task)], limit=3)
        benchmark.run(config, context := context_of(tmp_path / str(count)))
        (file,) = (context.out / "lm_eval").rglob("samples_samples_*.jsonl")
        texts.append([json.loads(line)["resps"][0] for line in file.read_text().splitlines()])
    assert [answers[:1] for answers in texts[1]] == texts[0]
    assert all(first != second for first, second in texts[1])


def test_two_processes_answer_a_share_each_and_the_figures_are_those_of_one(checkpoints, held_out, rolling, tmp_path):
    from eval import benchmark

    benchmark.run(settings(checkpoints, held_out, [rolling]), alone := context_of(tmp_path / "alone"))
    shutil.rmtree(tmp_path / "cache")
    both = settings(checkpoints, held_out, [rolling], data_parallel_size=2)
    benchmark.run(both, shared := context_of(tmp_path / "shared"))
    assert figures(shared) == figures(alone)
    kept = [list(folder.iterdir()) for folder in (tmp_path / "cache" / "answers").iterdir()]
    assert [len(files) for files in kept] == [2, 2]
    assert all(len(path.read_text().splitlines()) > 3 for files in kept for path in files)


@pytest.mark.long
def test_an_error_in_one_of_two_processes_is_the_stages_own(checkpoints, held_out, tmp_path):
    from eval import benchmark

    config = settings({"first": checkpoints["first"]}, held_out, data_parallel_size=2, max_length=16)
    with pytest.raises(UserError, match=r"max_length: \d+ of \d+ requests don't fit"):
        benchmark.run(config, context_of(tmp_path / "short"))


def test_more_processes_than_the_machine_has_place_for_are_refused(checkpoints, held_out, tmp_path):
    from eval import benchmark

    config = settings({"first": checkpoints["first"]}, held_out, data_parallel_size=999)
    with pytest.raises(UserError, match=r"data_parallel_size: 999 processes don't fit on \d+ "):
        benchmark.run(config, context_of(tmp_path))
