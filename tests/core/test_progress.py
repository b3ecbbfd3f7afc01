"""Progress bars: on a terminal, when it takes long, one below the other."""

import io

import pytest
from rich.console import Console

from prunus.core import progress
from prunus.core.progress import Bar, track


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def test_items_pass_through_and_nothing_is_shown_off_a_terminal():
    console = Console(file=io.StringIO())
    assert list(track(range(3), "work", console)) == [0, 1, 2]
    assert console.file.getvalue() == ""


def test_a_bar_inside_another_is_a_line_below_it_and_goes_first(screen):
    outer = Bar("block 1 of 2", 2, screen)
    outer.step(0)
    for _ in track([1, 2], "calibration", screen):
        outer._progress.refresh()
    assert [task.description for task in outer._progress.tasks] == ["block 1 of 2"]
    outer.step(1, "block 2 of 2; error 0.01")
    assert outer._progress.tasks[0].description == "block 2 of 2; error 0.01"
    outer.close()
    assert "calibration" in screen.file.getvalue()


def test_after_an_error_in_between_the_next_bar_is_its_own(screen):
    with pytest.raises(RuntimeError):
        for _ in track([1, 2], "work", screen):
            raise RuntimeError
    alone = Bar("alone", 1, screen)
    assert alone._outer is None
    alone.close()
