"""What people write and bring, through the command line: one line each, and what is left behind afterwards."""

import json
from pathlib import Path
from typing import Any

import architectures
import pytest
from families import talk

GOOD = {"messages": talk("hello", "German")}
RECIPE = """
name: r
seed: 1
stages:
  sft:
    {{uses: posttrain.sft, model: {model}, data: [{{path: {data}}}], {keys}, global_batch_size: 2,
     trainer: {{max_length: 200, num_train_epochs: 1}}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.make_family(tmp_path_factory.mktemp("model") / "m", "qwen2_5")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def broken_link(path: Path) -> None:
    path.symlink_to("gone.jsonl")


PLANS: dict[str, tuple[Any, str]] = {
    "empty.jsonl": ("", "holds no rows"),
    "cut.json": ('[{"messages": [', "can't be read to its end: no JSON in line 1"),
    "unknown.jsonl": (lines({"question": "a"}), "can't be told what it is: its columns are 'question'"),
    "pairs.jsonl": (lines({"prompt": "a", "chosen": "b", "rejected": "c"}), "posttrain.dpo trains on pairs"),
    "folder.jsonl": (Path.mkdir, "the folder holds no .parquet"),
    "link.jsonl": (broken_link, "is a link to gone.jsonl, which is not there"),
    "rows.yaml": ("a: 1", "is no .parquet, .arrow, .jsonl"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_can_not_be_is_one_line(cordee: Any, write: Any, model: Path, tmp_path: Path, name: str) -> None:
    content, problem = PLANS[name]
    write(name, content) if isinstance(content, str) else content(tmp_path / name)
    write("r.yaml", RECIPE.format(model=model, data=name, keys="bad_rows: error"))
    done = cordee("plan", "r.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("cordee: r.yaml: stages.sft")
    assert problem in line


def test_a_run_and_a_preview_leave_out_what_the_keys_say(cordee: Any, write: Any, model: Path, tmp_path: Path) -> None:
    long = {"messages": talk("hello", "German " * 200)}
    rows = [lines(GOOD, None, {"messages": []}, GOOD), '{"messages": ' + "[" * 5000 + "\n", lines(long, {"x": 1}, GOOD)]
    write("odd.jsonl", "".join(rows))
    seen = cordee("data", "odd.jsonl", "--model", str(model), "max_length=200")
    assert seen.returncode == 0, seen.stderr
    for told in ("8 rows", "no JSON object (rows 2, 5)", "messages is empty", "longer than max_length=200"):
        assert told in seen.stdout
    write("r.yaml", RECIPE.format(model=model, data="odd.jsonl", keys="bad_rows: drop"))
    done = cordee("run", "r.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("`overlong: drop`, `truncate` or `cut` settles it")
    write("r.yaml", RECIPE.format(model=model, data="odd.jsonl", keys="bad_rows: drop, overlong: drop"))
    done = cordee("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    (source,) = json.loads((tmp_path / "runs/r/sft@1/rows.json").read_text())["sources"]
    assert (source["rows"], source["sequences"], sum(kind["rows"] for kind in source["left_out"])) == (8, 3, 5)
