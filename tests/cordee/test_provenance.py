"""What a manifest says of the code is what stood there when the stage started, where its module lies."""

import json
import subprocess
from pathlib import Path

import pytest

from cordee import provenance
from cordee.manifest import Git

SPRING = Path(__file__).parents[1] / "stages" / "toys" / "spring.py"


@pytest.fixture
def repository(tmp_path, write):
    write("lib/mine/__init__.py", "")
    write("lib/.gitignore", "__pycache__/\n")
    folder = tmp_path / "lib"
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(folder, *arguments)
    return folder


def git(folder, *arguments: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_says_the_commit_and_whether_anything_changed_since(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.git(repository / "mine") == Git(commit=commit, dirty=False)
    (repository / "mine" / "new.py").write_text("")
    assert provenance.git(repository / "mine") == Git(commit=commit, dirty=True)


def test_a_package_that_only_lies_below_a_repository_is_of_no_commit(repository, write, tmp_path):
    write("lib/.venv/lib/theirs/stage.py", "")
    assert provenance.git(repository / ".venv/lib/theirs") is None
    assert provenance.git(tmp_path) is None


def test_a_manifest_names_the_commit_that_ran_and_not_what_came_after(repository, write, cordee, tmp_path, monkeypatch):
    begin, change = '    """Write the line."""\n', '    Path(__file__).with_name("new").touch()\n'
    write("lib/mine/brook.py", SPRING.read_text().replace(begin, begin + change))
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "second")
    monkeypatch.setenv("PYTHONPATH", str(repository), prepend=":")
    write("brook.yaml", "name: brook\nstages: {spring: {uses: mine.brook}}")
    done = cordee("run", "brook.yaml")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/brook/spring@1/manifest.json").read_text())
    assert manifest["git"] == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    assert provenance.git(repository / "mine").dirty, "the stage did change its folder"
