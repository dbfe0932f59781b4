"""`uses` names a module; what names none is one line, and no other file is read for it."""

import pytest

from cordee import stage
from cordee.errors import Stopped, UserError
from cordee.stage import Context


def test_loading_a_stage_reads_no_other_file(write, tmp_path, monkeypatch):
    write("rapids/__init__.py", "")
    write("rapids/broken.py", "this is no Python")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stage, "STAGE_PACKAGES", ("rapids",))
    assert stage.load("toys.spring").uses == "toys.spring"
    with pytest.raises(SyntaxError):
        stage.load("toys.sprang")


@pytest.mark.parametrize("uses", ["pretrain.trian", ".train", "pretrain..train", "pretrain.train.", "", "..", "a b.c"])
def test_a_name_of_no_module_is_one_line(uses):
    with pytest.raises(UserError) as caught:
        stage.load(uses, file="r.yaml", key="stages.base.uses")
    assert str(caught.value).startswith(f"r.yaml: stages.base.uses: no stage {uses!r}; ")


def test_a_module_that_is_no_stage_says_what_it_lacks():
    with pytest.raises(UserError, match=r"module 'json.decoder' is no stage: it needs `Config` and `run`"):
        stage.load("json.decoder")


def test_a_stage_that_saves_no_state_ends_where_it_is_asked_to_and_says_that_it_begins_again(tmp_path):
    context = Context(out=tmp_path, seed=0, events=tmp_path / "events.jsonl")
    context.stop_if_asked("document 3 of 9")
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match="stopped at document 3 of 9; the next run begins this stage again"):
        context.stop_if_asked("document 3 of 9")
