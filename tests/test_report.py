"""Seconds by stage, and the figures of the load."""

from __future__ import annotations

import time

import pytest

from fluxbatch import report


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_stage_within_another_is_counted_once(clock):
    seen = report.Report(quiet=True)
    with seen.stage("generate"):
        clock(1)
        with seen.stage("load"):
            clock(10)
            with seen.stage("other"):
                clock(100)
        clock(2)
        with seen.stage("load"):
            clock(20)
    with seen.stage("generate"):
        clock(4)
    assert seen.seconds == {"other": 100, "load": 30, "generate": 7}


def test_the_figures_of_the_load(clock, capsys):
    seen = report.Report()
    with seen.bar(2, "images", "img") as images, seen.loading(6_000_000_000) as read:
        clock(1)
        read(4_000_000_000)
        clock(3)
        read(2_000_000_000)
        images.update()
    assert seen.load() == {"bytes": 6_000_000_000, "seconds": 4, "gigabytes_per_second": 1.5}
    counts = {"rows": 1, "made": 1, "before": 0, "rejected": 0}
    assert seen.figures(counts)["weights"] == "6.00GB at 1.50GB/s"
    seen.summary(counts, "there")
    said = capsys.readouterr()
    assert "weights    6.00GB at 1.50GB/s" in said.out
    assert "loading: 100%" in said.err and "6.00G/6.00G" in said.err
    assert report.Report(quiet=True).figures(counts | {"made": 0})["weights"] is None  # nothing was read


class Until:
    """Outputs of a program that ends at a time."""

    def __init__(self, end):
        self.end = end

    def block_until_ready(self):
        time.advance(self.end)


def test_how_busy_the_devices_were(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "advance", lambda end: now.__setitem__(0, max(now[0], end)), raising=False)
    seen = report.Report()
    seen.peak = 10.0
    assert seen.speed() == {}
    for since, end, pictures in ((0, 3, False), (4, 10, True), (8, 14, True), (15, 16, False), (17, 24, True), (24, 30, False)):
        seen.launched(since, Until(end), pictures)
    for _ in range(3):
        seen.drawing(2, 20.0)
    # from 4 to 24; without work from 14 to 15 and from 16 to 17
    assert seen.speed() == {"images_per_second": 0.3, "seconds_per_image": 3.333, "device_busy": 0.9, "mfu": 0.3, "floor_ratio": 3.333}
    seen.summary({"rows": 6, "made": 6, "before": 0, "rejected": 0}, "there")
    assert "busy 90.0% of that time; 30% of their peak, 3.33 × the floor" in capsys.readouterr().out
