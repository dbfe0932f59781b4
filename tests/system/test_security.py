"""The lines of docs/security.md that concern commands and files as a whole, each with the attack planted."""

import contextlib
import json
import os
import pickle
import pty
import sys
from pathlib import Path

import pytest

from cordee.errors import UserError
from cordee.recipe import load

sys.path[:0] = [str(Path(__file__).parents[1] / place) for place in ("posttrain", "cordee/chat")]
COMMAND = [sys.executable, "-P", "-c", "from cordee.cli import main; main()"]
SECRET = "Pl4nted-and-never-shown"  # noqa: S105 - the planted one
STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e[bold]bold[/bold]"


def holders(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold a secret."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def leaky(tmp_path: Path, **keys: object) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": {"s": {"uses": "toys.leaky", **keys}}}))


def test_a_stage_that_fails_with_secrets_in_its_error(cordee, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKY_API_KEY", SECRET)
    leaky(tmp_path)
    done = cordee("run", "r.yaml")
    assert done.returncode == 1
    assert "401 for https://***@host/x: ***" in done.stderr
    assert "Traceback" in (tmp_path / "runs/r/logs/s@1/log.txt").read_text(), "the log is one, and hides it"
    status = cordee("status", "r.yaml")
    assert SECRET not in done.stdout + done.stderr + status.stdout + status.stderr
    assert holders(tmp_path / "runs", SECRET) == []


def test_a_stage_does_not_have_the_hubs_token(cordee, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"hf_{'a1B2' * 9}")
    leaky(tmp_path, fails=False)
    assert cordee("run", "r.yaml").returncode == 0
    assert json.loads((tmp_path / "runs/r/s@1/seen.json").read_text()) == {"hub": False, "asks": ""}


@pytest.mark.parametrize("secret", [f"hf_{'a1B2' * 9}", SECRET])
@pytest.mark.parametrize("form", ["{}", "https://me:{}@host/chats.jsonl", "x {} y"])
@pytest.mark.parametrize("place", ["a key", "a list", "an override"])
def test_a_secret_in_a_recipe_is_refused(secret, form, place, cordee, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    text = form.format(secret)
    stage = {"uses": "posttrain.sft", "model": "m", "data": [{"path": "a.jsonl"}]}
    if place == "a key":
        stage["model"] = text
    elif place == "a list":
        stage["data"][0]["path"] = text
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": {"sft": stage}}))
    given = [f"sft.model='{text}'"] if place == "an override" else []
    with pytest.raises(UserError, match=r"r\.yaml: stages\.sft\..*: holds what looks like a token, a key or") as error:
        load(tmp_path / "r.yaml", given)
    assert secret not in str(error.value)
    if (form, place) == ("x {} y", "an override"):
        done = cordee("run", "r.yaml", *given)
        assert (done.returncode, secret in done.stdout + done.stderr) == (2, False)
        assert not (tmp_path / "runs").exists()


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_script_and_no_pickle_of_a_data_set_is_run(tmp_path, monkeypatch):
    """By our own reader, and by `datasets`, through which lm-eval's tasks read theirs."""
    import datasets

    from cordee.data.folder import find_files

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mark, folder = tmp_path / "it-ran", tmp_path / "chats"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "chats.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    for name in ("train.pkl", "train.pickle", "train.pt", "state.bin"):
        (folder / name).write_bytes(pickle.dumps(Planted(mark)))
    assert find_files(folder).documents == [folder / "train.jsonl"]
    with contextlib.suppress(RuntimeError, ValueError):  # it reads train.jsonl, or refuses the script
        datasets.load_dataset(str(folder), trust_remote_code=True)
    with pytest.raises(Exception, match=r"(?i)pickle"):
        datasets.load_dataset("pandas", data_files=str(folder / "train.pkl"), cache_dir=str(tmp_path / "cache"))
    assert not mark.exists()


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """What a command writes to a terminal."""
    process, main = pty.fork()
    if process == 0:
        os.chdir(cwd)
        os.execvpe(COMMAND[0], [*COMMAND, *arguments], {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150"})  # noqa: S606 - fixed words
    said = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            part = b""
        if not part:
            os.waitpid(process, 0)
            return said.decode(errors="replace").replace("\r\n", "\n")
        said += part


def test_no_row_of_data_steers_the_terminal(tmp_path):
    """A chat with such signs in its text, its columns, and its file's name, in a preview and in an error."""
    from architectures import make

    make(tmp_path / "model", "llama")
    row = {
        "messages": [{"role": "user", "content": f"q {STEERING}"}, {"role": "assistant", "content": f"a {STEERING}"}]
    }
    file = tmp_path / f"chats{STEERING[:4]}.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({f"x{STEERING}": 1}) + "\n")
    recipe = {
        "name": "r",
        "stages": {"s": {"uses": "posttrain.sft", "model": f"m{STEERING}", "data": [{"path": str(file)}]}},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    shows = ["data", str(file), "--model", "model", "bad_rows=drop"]
    for words in (["plan", "r.yaml"], shows, ["init", "new.yaml", "--chats", str(file), "--model", "model"]):
        said = on_a_terminal(*words, cwd=tmp_path)
        assert said
        for sign in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e"):
            assert sign not in said, words
