"""Progress of loads: what a meter says, a log shows and a terminal draws."""

import io

import pytest
from rich.console import Console

from cortex.cli.progress import Meter, PlainProgress, TerminalProgress, amount, duration, progress_view
from cortex.testing import ManualClock
from cortex.wire.node import Progress

MB = 10**6


def fetching(done: int, total: int = 100 * MB) -> Progress:
    return Progress(phase="fetching", done=done, total=total)


def test_a_reading_has_share_amounts_rate_and_time_left() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    meter.read(fetching(0))
    clock.now += 4
    reading = meter.read(fetching(20 * MB))
    assert reading == ("fetching", 0.2, "20 %, 20.0 MB of 100.0 MB, 5.0 MB/s, 16 s left")


def test_the_first_reading_claims_no_rate() -> None:
    assert Meter(ManualClock()).read(fetching(20 * MB)).text == "20 %, 20.0 MB of 100.0 MB"


def test_a_resumed_download_counts_only_what_came_now() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    meter.read(fetching(90 * MB))
    clock.now += 1
    assert meter.read(fetching(91 * MB)).text.endswith("1.0 MB/s, 9 s left")


def test_the_rate_forgets_what_is_long_past() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    meter.read(fetching(0))
    for second in range(1, 40):
        clock.now += 1
        text = meter.read(fetching((10 + second) * MB)).text
    assert "1.0 MB/s" in text


def test_a_new_phase_starts_a_rate_of_its_own() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    meter.read(fetching(0))
    clock.now += 5
    assert (
        meter.read(Progress(phase="reading", done=50 * MB, total=100 * MB)).text
        == "50 %, 50.0 MB of 100.0 MB"
    )


def test_an_unknown_total_gives_no_share_and_no_time_left() -> None:
    clock = ManualClock()
    meter = Meter(clock)
    meter.read(Progress(phase="fetching", done=0))
    clock.now += 2
    assert meter.read(Progress(phase="fetching", done=4 * MB)) == ("fetching", None, "4.0 MB, 2.0 MB/s")


def test_a_count_beyond_the_total_stays_at_the_whole() -> None:
    assert Meter(ManualClock()).read(fetching(101, 100)).fraction == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599, "59 min 59 s"), (7800, "2 h 10 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_amounts_carry_their_unit() -> None:
    assert [amount(3_200, "bytes"), amount(2 * 10**9, "bytes"), amount(7, "layers")] == [
        "3.2 kB",
        "2.00 GB",
        "7 layers",
    ]


def test_a_log_gets_a_line_at_the_start_every_five_seconds_and_at_the_end() -> None:
    clock, out = ManualClock(), io.StringIO()
    view = PlainProgress(out, clock)
    for megabytes in range(0, 101, 10):
        view.show(fetching(megabytes * MB))
        clock.now += 1
    view.show(fetching(100 * MB))
    view.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0", "50", "100"]
    assert lines[1] == "fetching: 50 %, 50.0 MB of 100.0 MB, 10.0 MB/s, 5 s left"


def test_a_log_names_each_phase_once() -> None:
    out = io.StringIO()
    view = PlainProgress(out, ManualClock())
    for phase in ("starting", "starting", "warming"):
        view.show(Progress(phase=phase))
    assert out.getvalue() == "starting\nwarming\n"


def draw(*reports: Progress) -> str:
    clock, out = ManualClock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    view = TerminalProgress(console, clock, animate=False)
    for report in reports:
        view.show(report)
        clock.now += 2
    view.close()
    view.close()
    return out.getvalue()


def test_a_terminal_shows_phase_bar_and_figures_in_place() -> None:
    drawn = draw(fetching(0), fetching(50 * MB))
    assert "fetching" in drawn
    assert "━" in drawn
    assert "50 %, 50.0 MB of 100.0 MB, 25.0 MB/s, 2 s left" in drawn
    assert drawn.endswith("\x1b[2K")  # the line is wiped: nothing of it stays


def test_a_terminal_can_go_from_a_known_to_an_unknown_total_and_back() -> None:
    drawn = draw(fetching(50 * MB), Progress(phase="starting [worker]"), fetching(10 * MB))
    assert "starting [worker]" in drawn
    assert "10 %" in drawn


def test_what_is_no_terminal_gets_plain_lines() -> None:
    out = io.StringIO()
    progress_view(out).show(fetching(MB))
    assert out.getvalue() == "fetching: 1 %, 1.0 MB of 100.0 MB\n"
