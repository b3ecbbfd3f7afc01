import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.modifiers.schedules import CURVES, Schedule
from prunus.modifiers.timing import Timeline, Window, parse_duration


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_ends_at_one_and_never_falls(name):
    curve = CURVES[name]
    values = [curve(i / 100) for i in range(101)]
    assert values[-1] == pytest.approx(1)
    assert values == sorted(values)
    assert name == "constant" or values[0] == pytest.approx(0)


@pytest.mark.parametrize(
    ("curve", "half"),
    [
        ("linear", 0.5),
        ("cubic", 1 - 0.5**3),
        ("inverse_cubic", 1 - 0.5 ** (1 / 3)),
        ("cosine", 0.5),
        ("constant", 1.0),
    ],
)
def test_curves_are_those_of_the_papers(curve, half):
    assert Schedule(0.2, 0.7, curve)(0.5) == pytest.approx(0.2 + 0.5 * half)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["linear", "cubic", "cosine"]),
    st.floats(-1, 2),
)
def test_a_schedule_stays_between_its_ends_and_ends_exactly(begin, end, curve, progress):
    schedule = Schedule(begin, end, curve)
    assert min(begin, end) - 1e-12 <= schedule(progress) <= max(begin, end) + 1e-12
    assert schedule(1) == end


def test_steps_take_equal_parts_unless_told():
    even = Schedule(values=(0.5, 0.6, 0.75, 0.9))
    assert [even(t) for t in (0, 0.2, 0.25, 0.5, 0.74, 0.75, 1)] == [
        0.5,
        0.5,
        0.6,
        0.75,
        0.75,
        0.9,
        0.9,
    ]
    told = Schedule(values=(0.5, 0.9), at=(0.0, 0.1))
    assert [told(t) for t in (0, 0.05, 0.1, 1)] == [0.5, 0.5, 0.9, 0.9]


def test_a_cycle_starts_anew():
    schedule = Schedule(1.0, 0.0, "linear")
    assert [schedule(t, 0.5) for t in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 0.5, 1, 0.5, 0])
    wave = Schedule(1.0, 0.0, "cyclic", cycle="5ep")
    assert wave(0.25, 0.5) == pytest.approx(0.5)
    assert wave(0.375, 0.5) == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "cubik", "to": 1.0}, "unknown curve 'cubik'; did you mean 'cubic'"),
        ({"from_": 0.1}, "needs 'to'"),
        ({"to": 0.5, "curve": "cubic"}, "needs 'from'"),
        ({"curve": "steps"}, "needs 'values'"),
        ({"values": (1.0,), "to": 0.5}, "takes 'values', not"),
        ({"to": 0.5, "curve": "constant", "values": (0.5,)}, "belong to curve 'steps'"),
        ({"values": (0.1, 0.2), "at": (0.0,)}, "1 entries for 2 'values'"),
        ({"values": (0.1, 0.2), "at": (0.5, 0.6)}, "must rise from 0"),
        ({"from_": 0.1, "to": 0.5, "curve": "cyclic"}, "needs 'cycle'"),
        ({"from_": 0.1, "to": 0.5, "cycle": "5"}, "not a duration"),
    ],
)
def test_bad_schedules_say_what_is_missing(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3ep", (3, "ep")),
        ("0.5ep", (0.5, "ep")),
        ("500step", (500, "step")),
        ("40%", (40, "%")),
        ("2 epochs", (2, "ep")),
        ("7steps", (7, "step")),
        (" 1epoch ", (1, "ep")),
    ],
)
def test_durations_read(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["3", "3epp", "", "-1ep", "1.5step", "140%", "1e3step", "ep"])
def test_bad_durations_are_refused(text):
    with pytest.raises(ValueError, match=r"'.*'"):
        parse_duration(text)


def test_a_timeline_counts_optimizer_steps():
    timeline = Timeline(10, 4)
    assert [timeline.steps(d) for d in ("3ep", "7step", "50%", "0.5ep")] == [30, 7, 20, 5]
    with pytest.raises(ValueError, match="steps_per_epoch= and epochs="):
        Timeline(10).steps("50%")
    with pytest.raises(ValueError, match="at least 1"):
        Timeline(0)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_ticks_begin_and_end_with_the_window(begin, length, every):
    end = begin + length
    ticks = Window(f"{begin}step", f"{end}step", f"{every}step").ticks(Timeline())
    assert ticks == sorted(set(ticks))
    assert ticks[-1] == end
    assert ticks[0] == begin
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    assert len(ticks) == 2 or all(gap >= every / 2 for gap in gaps)


@pytest.mark.parametrize("total", [1000, 1001, 1002, 1003])
def test_cycles_that_fill_training_end_with_it(total):
    timeline = Timeline(steps_per_epoch=total, epochs=1)
    schedule = Schedule(1.0, 0.0, "linear", cycle="25%")
    share = timeline.cycle("25%", total)
    values = [schedule(step / total, share) for step in range(total + 1)]
    assert values[0] == pytest.approx(1)
    assert max(values[-50:]) < 0.25
    assert sum(b > a for a, b in itertools.pairwise(values)) == 3  # restarts


def test_a_cycle_that_does_not_fill_training_keeps_its_length():
    assert Timeline(steps_per_epoch=10, epochs=12).cycle("5ep", 120) == 50 / 120
