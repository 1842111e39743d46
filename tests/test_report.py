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
    assert seen.summary(counts, "there")["weights"] == "6.00GB at 1.50GB/s"
    said = capsys.readouterr()
    assert "weights    6.00GB at 1.50GB/s" in said.out
    assert "loading: 100%" in said.err and "6.00G/6.00G" in said.err
    assert report.Report(quiet=True).summary(counts | {"made": 0}, "there")["weights"] is None  # nothing was read
