"""The documents say what is there: links lead somewhere, the tree is the real one, the commands exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from cordee import alone, files, prove, recipe, sweep, yaml12
from cordee.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").rglob("*.md"), *ROOT.glob("examples/*/*.md")]
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE_LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w./-]+)  +\S", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readmes_tree_is_the_real_one():
    tree = README.partition("<!-- tree -->\n```\n")[2].partition("```")[0]
    told, folder = set(), ""
    for line in TREE_LINE.finditer(tree):
        folder = line["name"] if not line["indent"] else folder
        told.add(line["name"] if not line["indent"] else f"{folder}{line['name']}")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {f"{name.partition('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    packages = ("cordee/", "pretrain/", "posttrain/", "eval/")
    sources = [name for name in tracked if name.startswith(packages) and not name.endswith("__init__.py")]
    modules = {name for name in sources if name.count("/") == 1}
    nested = [name for name in tracked if name.startswith((*packages, "examples/")) and name.count("/") > 1]
    folders = {"/".join(name.split("/")[:2]) + "/" for name in nested}
    assert told == top | modules | folders


def test_the_readmes_recipe_is_the_one_that_is_shipped():
    shipped = (ROOT / "configs/recipes/quickstart.yaml").read_text(encoding="utf-8")
    assert f"```yaml\n{shipped}```" in README


def test_the_readmes_other_recipes_are_right(tmp_path, monkeypatch):
    (tmp_path / "models/my-model").mkdir(parents=True)
    for name in ("my-corpus.parquet", "my-chats.jsonl", "my-questions.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    mine, aligned, _, own = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for text, last in ((mine, "eval.report"), (aligned, "posttrain.grpo"), (own, "pretrain.train")):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        assert recipe.load(tmp_path / "recipe.yaml").stages[-1].stage.uses == last


def commands(start: str = "cordee ") -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith(start)]


def test_a_package_is_installed_as_make_setup_installs_the_example():
    (command,) = commands("pip install ")
    setup = (ROOT / "Makefile").read_text(encoding="utf-8")
    *options, place = command.split()[2:]
    assert (ROOT / place / "pyproject.toml").exists()
    assert all(option in setup for option in options)
    assert f"--editable {place}" in setup


def understand(command: str, file: Path) -> None:
    """Check what a command names as it would itself: the stage, its keys in `file`, and the overrides."""
    words = command.split()
    if words[0] == "accelerate":
        alone._recipe(words[words.index("-m") + 1], file, [word for word in words if "=" in word])
        return
    if words[1] == "sweep":
        assert len(sweep.variants(file, [], [words[words.index("--over") + 1]])) > 1
        return
    of = recipe.load(file, [word for word in words[3:] if "=" in word])
    if words[1] == "stage":
        assert words[3] in [item.name for item in of.stages]
    if words[1] == "prove":
        assert words[3] in prove.find()


def of_recipes() -> list[str]:
    return [command for command in commands() if "configs/recipes/" in command]


def test_the_readme_has_commands():
    assert (len(commands()) >= 8, len(of_recipes()) >= 6, len(commands("accelerate launch "))) == (True, True, 1)


@pytest.mark.parametrize("command", of_recipes())
def test_what_a_readme_command_names_is_there(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    understand(command, ROOT / command.split()[2])


@pytest.fixture
def my_sft(tmp_path, write, monkeypatch):
    """The keys of the README's own SFT stage in a file of their own."""
    monkeypatch.chdir(tmp_path)
    mine, *_ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    keys = {name: value for name, value in yaml12.parse(mine)["stages"]["sft"].items() if name != "uses"}
    return write("my-sft.yaml", json.dumps(keys))


@pytest.mark.parametrize("command", commands("accelerate launch "))
def test_a_stage_alone_takes_the_readmes_keys(command, my_sft):
    assert Path(command.split()[command.split().index("--config") + 1]).name == my_sft.name
    understand(command, my_sft)


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch -m posttrain.stf --config my-sft.yaml",
        "accelerate launch -m posttrain.sft --config my-sft.yaml trainer.learning_rtae=5e-4",
        "cordee run configs/recipes/quickstart.yaml sft.trainer.learning_rtae=5e-4",
    ],
)
def test_a_readme_command_that_is_wrong_is_seen(command, my_sft):
    with pytest.raises(UserError, match="did you mean"):
        understand(command, my_sft if "my-sft" in command else ROOT / command.split()[2])


@pytest.mark.parametrize("command", commands())
def test_a_readme_command_is_understood(command, cordee):
    verb = command.split()[1]
    helped = cordee(verb, "--help")
    assert helped.returncode == 0, helped.stderr
    for option in re.findall(r"--[\w-]+", command):
        assert option in helped.stdout


@pytest.mark.parametrize("command", [line for line in commands() if line.split()[1] in ("plan", "list")])
def test_a_readme_command_that_only_reads_runs(command, cordee, tmp_path):
    store = ("--runs", str(tmp_path / "runs")) if "plan" in command else ()
    done = cordee(*command.split()[1:], *store, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_data_that_are_shipped_are_those_that_their_readme_names():
    told = dict(re.findall(r"`(\w[\w./-]*\.parquet)`.*`([0-9a-f]{64})`", (ROOT / "data/README.md").read_text("utf-8")))
    assert told == {
        str(path.relative_to(ROOT / "data")): files.sha256(path) for path in (ROOT / "data").rglob("*.parquet")
    }


def test_every_pinned_package_has_one_exact_version():
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line) for line in lines)
    assert len({line.partition("==")[0].lower() for line in lines}) == len(lines) > 100


def test_each_line_of_security_names_its_test():
    """The page of what is defended: each line of its tables links to a test, and what it names is there."""
    lines = (ROOT / "docs/security.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "](../tests/" in line]
    start, file, seen = lines.index("## Nothing from outside is unpickled"), "", 0
    for line in lines[start : lines.index("## What is not defended")]:
        if not line.startswith("| ") or line == "| defended | test |":
            continue
        links = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", line)
        assert links or "the same file" in line, line
        file = links[-1] if links else file
        sources = [(ROOT / name).read_text(encoding="utf-8") for name in links or [file]]
        for name in re.findall(r"`(test_\w+)`", line):
            assert any(f"def {name}(" in source for source in sources), name
        seen += 1
    assert seen > 20
    assert rows
