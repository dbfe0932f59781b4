"""A task is all that its file reads: what it includes, and the functions that it names."""

import importlib
import subprocess
import sys

import pytest

from cordee import attempt, hashes, plan, recipe
from cordee.artifact import Store
from cordee.errors import Fault, UserError
from eval.measuring.task_files import TaskFile

RECIPE = """
name: mine
stages:
  bench: {{uses: eval.benchmark, models: {{first: {model}}}, tasks: [tasks/answer.yaml]}}
"""
FILES = {
    "tasks/answer.yaml": "include: [../shared/base.yaml]\ntask: answer\n",
    "shared/base.yaml": "include: deeper.yaml\nprocess_docs: !function utils.documents\n",
    "shared/deeper.yaml": "metric_list: [{metric: acc, aggregation: !function parts.means.own}]\n",
    "shared/utils.py": "def documents(rows): return rows\n",
    "shared/parts/means.py": "own = sum\n",
    "tasks/utils.py": "def documents(rows): return []\n",
}


@pytest.fixture
def mine(checkpoints, tmp_path, monkeypatch):
    """Plans a recipe whose one task is made of several files."""
    monkeypatch.chdir(tmp_path)
    for name, text in {**FILES, "mine.yaml": RECIPE.format(model=checkpoints["first"])}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return lambda: plan.make(recipe.load(tmp_path / "mine.yaml", ()), Store(tmp_path / "runs"))


@pytest.mark.parametrize("name", FILES)
def test_an_edit_of_what_a_task_reads_is_another_identity(name, mine, tmp_path):
    before = mine().stage("bench").fingerprint
    assert mine().stage("bench").fingerprint == before
    with (tmp_path / name).open("a") as file:
        file.write("# other\n")
    is_read = name != "tasks/utils.py"  # lies beside a file that does not name it
    assert (mine().stage("bench").fingerprint != before) == is_read


def test_an_edit_after_the_plan_is_a_fault(mine, tmp_path):
    made = mine()
    (tmp_path / "shared" / "utils.py").write_text("documents = sorted\n")
    with (
        pytest.raises(Fault, match=r"answer\.yaml changed since the plan was made"),
        attempt.begin(made, made.stage("bench"), {}),
    ):
        pass


@pytest.mark.usefixtures("mine")
def test_what_counts_is_what_lm_eval_reads(tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml

    (tmp_path / "shared" / "utils.py").write_text("def documents(rows): return 'shared'\n")
    read = load_yaml(tmp_path / "tasks" / "answer.yaml")
    assert read["process_docs"]([]) == "shared"
    assert read["metric_list"][0]["aggregation"] is sum
    names = [path.relative_to(tmp_path.resolve()).as_posix() for path in TaskFile("tasks/answer.yaml").further_files()]
    assert sorted(names) == sorted(set(FILES) - {"tasks/answer.yaml", "tasks/utils.py"})


@pytest.mark.parametrize("name", ["alone.py", "whole/__init__.py", "whole/part.py"])
def test_an_edit_of_a_module_that_is_imported_counts(name, tmp_path, monkeypatch):
    (tmp_path / "modules" / name).parent.mkdir(parents=True)
    (tmp_path / "modules" / "whole").mkdir(exist_ok=True)
    (tmp_path / "modules" / "whole" / "__init__.py").touch()
    (tmp_path / "modules" / name).write_text("own = sum\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    importlib.invalidate_caches()
    task = TaskFile(tmp_path / "task.yaml")
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    task.write_text(f"task: x\nprocess_docs: !function {module}.own\n")
    before = hashes.of_content(task)
    (tmp_path / "modules" / name).write_text("own = max\n")
    assert hashes.of_content(task) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: absent.yaml", r"tasks/answer\.yaml: include: no file 'absent\.yaml'"),
        ("[1", r"tasks/answer\.yaml: tasks: is no task file: .*expected ',' or ']'"),
        ("include: {a: b}", r"tasks/answer\.yaml: include: no file "),
        ("task: !!int x", r"tasks/answer\.yaml: tasks: is no task file: invalid literal"),
        ("[1]", r"tasks/answer\.yaml: tasks: is no task file: it holds no mapping"),
        ("include: answer.yaml", ""),
    ],
)
def test_what_a_plan_can_see_of_a_task_file_that_is_wrong_is_one_line(text, message, mine, tmp_path):
    (tmp_path / "tasks" / "answer.yaml").write_text(text)
    if not message:  # a cycle ends; lm-eval itself refuses it
        assert TaskFile("tasks/answer.yaml").further_files() == []
        return
    with pytest.raises(UserError, match=message) as caught:
        mine()
    assert "\n" not in str(caught.value)


PLAN = """
import sys
from pathlib import Path
from cordee import plan, recipe
from cordee.artifact import Store
plan.make(recipe.load(Path("mine.yaml"), ()), Store(Path("runs")))
print(sorted({"lm_eval", "torch", "utils", "parts"} & set(sys.modules)))
"""


@pytest.mark.usefixtures("mine")
def test_a_plan_imports_neither_lm_eval_nor_what_a_task_names():
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tasks_template_reaches_nothing(tmp_path):
    """lm-eval renders the templates of its YAML without a sandbox; here they are in one, with the same filters."""
    from jinja2.exceptions import SecurityError, UndefinedError
    from lm_eval import utils

    from eval.measuring import harness

    assert harness.lm_eval_utils is utils
    mark = tmp_path / "it-ran"
    for text in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        f"{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}",
        "{{ text.__class__ }}",
        "{{ ('{0.__class__}' | attr('format'))(text) }}",
    ):
        with pytest.raises((SecurityError, UndefinedError)):
            utils.apply_template(text, {"text": "a"})
    assert not mark.exists()
    said = utils.apply_template(
        "{{ text.strip() | regex_replace('a', 'b') }}{% set l = [] %}{{ l.append(1) }}\n", {"text": " a "}
    )
    assert said == "bNone\n"
    with pytest.raises(UndefinedError):
        utils.apply_template("{{ nothing }}", {})
