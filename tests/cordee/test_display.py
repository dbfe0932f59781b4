"""What a run shows of a stage, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from cordee import display
from cordee.display import Display


@pytest.fixture
def at_once(monkeypatch):
    for name in ("LINE_EVERY_S", "WAITED_S"):
        monkeypatch.setattr(display, name, -1.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_stage_waits_for_is_said_until_it_makes_progress(is_terminal):
    written = io.StringIO()
    with Display(Console(file=written, force_terminal=is_terminal, width=100)) as shown:
        shown.begin("bench", "starts as mine/bench@1")
        shown.tick()
        assert "waits for its first report, 0 s" in look(shown, written)
        shown.event("bench", {"event": "waits", "time": 0.0, "text": "vllm with models/a"})
        shown.tick()
        assert "waits for vllm with models/a, 0 s" in look(shown, written)
        shown.event("bench", {"event": "progress", "time": 0.0, "done": 1, "total": 2, "unit": "models", "figures": {}})
        shown.tick()
        assert look(shown, written).rstrip().endswith("models 1/2")
        shown.end("bench", "published")


def look(shown, written):
    """What stands on the screen or at the end of the log."""
    return shown.bars.tasks[-1].fields["text"] if shown.live else written.getvalue()


def test_a_short_wait_is_not_said():
    written = io.StringIO()
    with Display(Console(file=written, width=100)) as shown:
        shown.begin("bench", "starts as mine/bench@1")
        shown.tick()
        shown.end("bench", "published")
    assert "waits" not in written.getvalue()
