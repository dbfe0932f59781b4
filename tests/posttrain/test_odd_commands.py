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


PAIRS = """
name: r
seed: 1
stages:
  dpo:
    {{uses: posttrain.dpo, model: {model}, data: [{{path: a.jsonl}}, {{path: b.jsonl}}], lora: {{r: 2}},
     global_batch_size: 2, trainer: {{max_length: 200, max_steps: 1}}}}
"""


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


def test_a_preview_of_which_no_row_is_left_says_why_and_fails(cordee: Any, write: Any, model: Path) -> None:
    write("odd.jsonl", lines({"q": "hello", "a": "German", "rating": 4}, {"q": "hello", "a": "Swiss"}))
    done = cordee("data", "odd.jsonl", "--model", str(model))
    assert done.returncode == 2
    (refused,) = (line for line in done.stdout.splitlines() if "refused" in line)
    assert "2 rows: can't be told what it is: its columns are 'q', 'a', 'rating'" in refused
    assert done.stderr == "cordee: odd.jsonl: has no row that can be trained on\n"
    done = cordee("data", "odd.jsonl", "--model", str(model), "rows=1")
    assert done.stderr == "cordee: odd.jsonl: none of the rows that were looked at can be trained on\n"


def test_what_is_odd_in_chats_is_noted_by_their_preview_and_by_their_training(
    cordee: Any, write: Any, model: Path
) -> None:
    asking = {"messages": [*talk("hello", "German"), {"role": "user", "content": "and?"}]}
    write("odd.jsonl", lines(GOOD, asking, GOOD, {"messages": talk("why", "None")}))
    notes = (
        "1 of 4 chats ends with the user, whose last turn is never trained",
        "1 answer is only `None`: is a value missing there?",
        "1 row stands there twice: posttrain.data removes duplicates",
    )
    seen = cordee("data", "odd.jsonl", "--model", str(model))
    assert seen.returncode == 0
    write("r.yaml", RECIPE.format(model=model, data="odd.jsonl", keys="bad_rows: error"))
    done = cordee("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    for note in notes:
        assert seen.stdout.count(note) == 1, seen.stdout
        assert done.stdout.count(note) == 1, done.stdout


def test_pairs_that_contradict_each_other_are_noted_and_trained_on(cordee: Any, write: Any, model: Path) -> None:
    """Across the files of a stage too; and a plan says that it counts a pair for either answer."""
    pair, other = ({"prompt": "Who?", "chosen": one, "rejected": two} for one, two in (("I", "You"), ("a", "b")))
    write("a.jsonl", lines(pair, other, other))
    write("b.jsonl", lines({**pair, "chosen": "You", "rejected": "I"}))
    write("r.yaml", PAIRS.format(model=model))
    planned = cordee("plan", "r.yaml")
    assert "tokens of dpo: guessed at 3 bytes each, and a whole pair for either answer" in planned.stdout
    done = cordee("run", "r.yaml")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("1 pair stands there both ways round: the answer that one row chooses another row rej") == 1
    )
    assert done.stdout.count("1 row stands there twice: posttrain.data removes duplicates") == 1
