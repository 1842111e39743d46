"""Seconds by stage, and the figures of the load."""

from __future__ import annotations

import time

import plain
import pytest

from fluxbatch.generation.prompts import PromptEmbeds
from fluxbatch.reporting import terminal
from fluxbatch.shards import progress
from fluxbatch.shards.progress import EVERY, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_stage_within_another_is_counted_once(clock):
    seen = terminal.Report(quiet=True)
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
    seen = terminal.Report()
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
    assert terminal.Report(quiet=True).figures(counts | {"made": 0})["weights"] is None  # nothing was read


def test_what_streams_beside_the_stages_is_read_too(clock):
    seen = terminal.Report(quiet=True)
    with seen.loading(1) as read:
        read(1_000_000_000)
        clock(1)
    with seen.stage("generate"), seen.streaming() as read:
        read(5_000_000_000)
        clock(2)
    assert seen.load() == {"bytes": 6_000_000_000, "seconds": 3, "gigabytes_per_second": 2.0}
    assert seen.seconds == {"load": 1, "generate": 2}


def test_what_a_replica_made_is_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(time, "advance", lambda end: None, raising=False)
    seen = terminal.Report(quiet=True)
    counts = {"rows": 12, "made": 8, "before": 1, "rejected": 3}
    for since in (1.0, 2.0):
        seen.launched(since, Until(0), True)
    seen.drawing(3, 0.0)
    seen.summary(counts, "there", own=3)
    assert seen.figures(counts, own=3) | {"seconds": 0} == {
        "images": 9, "made now": 8, "rejected": 3, "speed": None, "weights": None, "seconds": 0}  # fmt: skip
    assert "rows       12: 3 made by this replica, 5 by others, 1 done before, 3 rejected\n" in capsys.readouterr().out
    seen.summary(counts, "there", own=3, others="left to others")
    assert (
        "rows       12: 3 made by this replica, 5 left to others, 1 done before, 3 rejected\n"
        in capsys.readouterr().out
    )
    assert terminal.Report(quiet=True).measured() == {}


def test_progress_is_told_now_and_then(clock):
    """Batches of two rows here and one in another process, every ten seconds; the second one's first row fails."""
    told = []
    counted = Progress(5, 40, lambda counts, speed: told.append((counts, speed.get("images_per_second"))))
    assert counted.counts == {"made": 0, "before": 5, "rejected": 0, "left": 40}
    for batch in range(9):
        rows = [plain.row(2 * batch), plain.row(2 * batch + 1)]
        counted.beside(rows[1], 1)
        assert [counted.through(row, row.index != 2) for row in rows] == [1, 2]
        clock(EVERY / 3)
    assert told.pop(0) == ({"made": 3, "before": 5, "rejected": 0, "left": 37}, None)  # the first batch
    assert told == [
        ({"made": 8, "before": 5, "rejected": 1, "left": 31}, 0.3),
        ({"made": 17, "before": 5, "rejected": 1, "left": 22}, 0.3),
    ]
    assert Progress(5, None, lambda *_: None).counts == {"made": 0, "before": 5, "rejected": 0}


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
    seen = terminal.Report()
    seen.peak = 10.0
    assert seen.speed() == {}
    for since, end, pictures in (
        (0, 3, False),
        (4, 10, True),
        (8, 14, True),
        (15, 16, False),
        (17, 24, True),
        (24, 30, False),
    ):
        seen.launched(since, Until(end), pictures)
    for _ in range(3):
        seen.drawing(2, 20.0)
    assert seen.devices.drawing().result() == 0.0  # the first call had it all
    # from 4 to 24; without work from 14 to 15 and from 16 to 17
    assert seen.speed() == {
        "images_per_second": 0.3,
        "seconds_per_image": 3.333,
        "device_busy": 0.9,
        "mfu": 0.3,
        "floor_ratio": 3.333,
    }
    seen.summary({"rows": 6, "made": 6, "before": 0, "rejected": 0}, "there")
    said = capsys.readouterr().out
    assert (
        "6 images in 20.0 s, from the launch of the first batch to the end of the last: 0.30 images/s, 3.33 s an "
        "image; " in said
    )
    assert (
        "devices    computing 90.0% of these 20.0 s, else they waited for " in said
        and "; 30% of their peak, 3.33 × the time at it\n" in said
    )


def test_the_devices_time_for_a_batch_is_without_their_waits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "advance", lambda end: now.__setitem__(0, max(now[0], end)), raising=False)
    seen, taken = terminal.Report(quiet=True), []
    # denoised, a wait for the decoder's program, decoded; the second one's texts, denoised behind them, decoded
    for launches in ([(1, 4, True), (50, 51, True)], [(51, 53, False), (52, 60, True), (53, 62, True)]):
        for since, end, pictures in launches:
            seen.launched(since, Until(end), pictures)
        taken.append(seen.drawing(1, 0.0))
    assert [each.result() for each in taken] == [4, 9]


def test_a_text_counts_once_however_many_shards_have_it(capsys):
    seen = terminal.Report(quiet=True)
    for keys, encoded in (("abc", "a"), ("abd", "d"), ("ab", "a")):
        seen.encoded(PromptEmbeds(dict.fromkeys(keys), str, frozenset(encoded), tuple))
    seen.summary({"rows": 1, "made": 1, "before": 0, "rejected": 0}, "there")
    assert (
        "texts      4 distinct: 2 encoded, 2 from the cache; 1 encoded once more for later shards\n"
        in capsys.readouterr().out
    )


# ---- bars, and lines where nobody watches


def test_where_no_terminal_is_there_are_lines(clock, capsys):
    """Each 5 %, but not twice in five seconds, and the last; 1,000 updates in two minutes are 20 lines and not
    1,000."""
    with progress.bar(1000, "images", "img") as bar:
        for _ in range(1000):
            clock(0.125)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "images:   5% 50/1000 [00:06<01:58,  8.00img/s]"
    assert lines[-1] == "images: 100% 1000/1000 [02:05<00:00,  8.00img/s]"
    assert len(lines) == 20


@pytest.mark.parametrize(("updates", "seconds", "expected"), [(20, 0.01, 1), (3, 0.5, 1), (40, 0.5, 4)])
def test_what_is_quick_has_few_lines(clock, capsys, updates, seconds, expected):
    with progress.bar(updates * 1000, "loading", "B", unit_scale=True) as bar:
        for _ in range(updates):
            clock(seconds)
            bar.update(1000)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == expected and "\r" not in said and "\x1b" not in said and said.endswith("B/s]\n")


@pytest.mark.parametrize("total", [10, None])
def test_there_is_a_line_each_minute_whatever_happens(capsys, monkeypatch, total):
    monkeypatch.setattr(progress, "MINUTE", 0.2)
    with progress.bar(total, "images", "img"):
        time.sleep(0.7)
        said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4 and all(line.startswith("images: ") and "0" in line for line in said)


def test_lines_leave_out_the_time_that_was_not_their_own(clock, capsys):
    with progress.bar(4, "images", "img") as bar:
        clock(100)
        bar.unpause()
        for _ in range(4):
            clock(1)
            bar.update()
    assert capsys.readouterr().err.splitlines()[-1] == "images: 100% 4/4 [01:44<00:00,  1.00img/s]"


def test_what_is_said_meanwhile_is_a_line_of_its_own(capsys):
    seen = terminal.Report()
    with seen.bar(4, "images", "img") as bar:
        bar.update()
        seen.say("a word")
        bar.update()
    assert capsys.readouterr().err.splitlines()[0] == "fluxbatch: a word"


def test_a_terminal_has_its_bar_and_a_quiet_process_neither(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.bar(4, "images", "img") as bar:
        bar.update(4)
    assert "\rimages: 100%|" in capsys.readouterr().err
    with progress.bar(4, "images", "img", quiet=True) as bar:
        bar.update(4)
    monkeypatch.undo()
    with progress.bar(4, "images", "img", quiet=True) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


def test_a_run_that_nobody_watches_writes_no_carriage_return(cli, golden, tmp_path):
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "hardware=cpu",
        "prompt=x",
        "num_images=30",
        "resolution=16",
        "num_inference_steps=1",
        f"output_dir={tmp_path}",
        "max_sequence_length=24",
    )
    assert (
        code == 0
        and "\r" not in err
        and "\x1b" not in err
        and "images: 100% 30/30" in err
        and len(err.splitlines()) < 8
    )


def test_the_bar_says_compiling_while_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(progress, "MINUTE", 0.0)
    report = terminal.Report()
    with report.generating(3, None):
        with report.compiling():
            time.sleep(0.25)
            assert "compiling" in capsys.readouterr().err
        report.advance(3)
    assert "images" in (said := capsys.readouterr().err) and "compiling" not in said


def test_a_process_that_is_silent_compiles_without_a_word(capsys):
    """All but the first process of a replica: their bars are disabled, and a disabled bar has no description."""
    report = terminal.Report(quiet=True)
    with report.generating(3, None), report.compiling():
        report.advance(3)
    assert capsys.readouterr().err == "" and "compile" in report.seconds
