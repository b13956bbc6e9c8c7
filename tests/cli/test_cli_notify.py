"""Readiness between a daemon and whoever started it."""

from pathlib import Path

from cortex.cli.notify import READY, Listener, notify


def test_what_is_told_is_heard() -> None:
    ear = Listener()
    notify(READY, "STATUS=listening", environ={"NOTIFY_SOCKET": ear.variable})
    assert ear.take() == [READY, "STATUS=listening"]
    assert ear.take() == []
    ear.close()


def test_each_listener_has_an_address_of_its_own() -> None:
    first, second = Listener(), Listener()
    notify(READY, environ={"NOTIFY_SOCKET": second.variable})
    assert (first.take(), second.take()) == ([], [READY])
    first.close()
    second.close()


def test_nobody_who_asked_and_nobody_who_listens_are_no_error(tmp_path: Path) -> None:
    notify(READY, environ={})
    notify(READY, environ={"NOTIFY_SOCKET": str(tmp_path / "gone")})
