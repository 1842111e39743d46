"""Verify: whatever happens to the images of a run is found, and repaired by one more start."""

from __future__ import annotations

import shutil
import sys

import plain
import pytest
from test_writer import start

from fluxbatch import verify
from fluxbatch.config.schema import ImageFormat, Output
from fluxbatch.results.image_files import EXTENSIONS, encode
from fluxbatch.results.location import LOCK
from fluxbatch.storage.registry import open_store

ROWS = [plain.row(k, height=8, width=8) for k in range(6)]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``python -m fluxbatch.verify ARGS``: (exit code, standard output and error)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fluxbatch.verify", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            verify.main()
        out, err = capsys.readouterr()
        return stop.value.code, out + err

    return call


@pytest.fixture
def run(tmp_path):
    """The directory of a whole run."""
    start(open_store(str(tmp_path / "out" / "demo")), ROWS)
    return tmp_path / "out" / "demo"


def damage(run):
    """One image gone, one cut short, one of other pixels, one of another size, one too many."""
    (run / "flux_0.png").unlink()
    (run / "flux_1.png").write_bytes((run / "flux_1.png").read_bytes()[:-50])
    shutil.copy(run / "flux_5.png", run / "flux_2.png")
    large = plain.pixels(ROWS[3]).repeat(2, axis=0)
    (run / "flux_3.png").write_bytes(encode(large, "png", text={}, png_level=1, quality=90))
    shutil.copy(run / "flux_5.png", run / "flux_77.png")


def test_a_whole_run(run, command):
    (run / ".fluxbatch/contact_sheet.png").write_bytes(b"the gallery's")
    code, text = command(f"output_dir={run.parent}", "run_name=demo")
    assert code == 0
    assert text == f"{run}: 6 records, 0 images missing, 0 damaged, 0 without a record\n"


def test_everything_that_is_wrong_is_listed(run, command):
    damage(run)
    code, text = command(f"output_dir={run.parent}", "run_name=demo")
    assert code == 3
    first, *findings = text.splitlines()
    assert first == f"{run}: 6 records, 1 images missing, 3 damaged, 1 without a record"
    assert findings[0] == "  missing   flux_0.png"
    assert findings[1].startswith("  damaged   flux_1.png: not a whole image: ")
    assert findings[2] == "  damaged   flux_2.png: other pixels than were recorded"
    assert findings[3] == "  damaged   flux_3.png: 8×16 pixels, but 8×8 were recorded"
    assert findings[4:] == ["  orphaned  flux_77.png"]


def test_a_repaired_run_is_whole_after_one_more_start(run, command):
    damage(run)
    (run / "flux_77.png").unlink()
    code, text = command(f"output_dir={run.parent}", "run_name=demo", "repair=true")
    assert code == 3 and "  repaired  4 rows are to be made again" in text
    _, writer = start(open_store(str(run)), ROWS)
    assert writer.written == 4
    assert command(f"output_dir={run.parent}", "run_name=demo")[0] == 0


def test_a_run_that_is_at_work_is_not_repaired(run, command):
    """It would write what is forgotten again, as it compacts its shard."""
    damage(run)
    with open_store(str(run)).hold(LOCK, shared=True):
        code, text = command(f"output_dir={run.parent}", "run_name=demo", "repair=true")
    assert code == 75 and "repaired" not in text and f"error: another start is at work in {run}" in text
    assert command(f"output_dir={run.parent}", "run_name=demo", "repair=true")[0] == 3


def test_without_its_ledger_a_run_is_not_repaired(run, command):
    shutil.rmtree(run / ".fluxbatch")
    assert command(f"output_dir={run.parent}", "run_name=demo", "repair=true")[0] == 0
    (run / "flux_0.png").unlink()
    code, text = command(f"output_dir={run.parent}", "run_name=demo", "repair=true")
    assert code == 2 and "repaired" not in text and f"error: {run}/.fluxbatch/records/: not there" in text
    assert (run / "metadata.jsonl").exists()


def test_every_run_below_the_output_place(run, command):
    start(open_store(str(run.parent / "sweep" / "0")), ROWS[:2])
    (run / "flux_0.png").unlink()
    shutil.rmtree(run / ".fluxbatch")  # copied without what is hidden: metadata.jsonl tells as much
    code, text = command(f"output_dir={run.parent}")
    assert code == 3
    assert [line.partition(",")[0] for line in text.splitlines()] == [
        f"{run}: 6 records",
        "  missing   flux_0.png",
        f"{run.parent}/sweep/0: 2 records",
    ]
    assert command(f"output_dir={run.parent}", "run_name=sweep/0")[0] == 0


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lossy_images_are_checked_by_what_they_say(tmp_path, format):
    output = Output(format=ImageFormat[format], filename="{i}", quality=50, png_level=1, gallery=False)
    store, ending = open_store(str(tmp_path)), EXTENSIONS[format]
    start(store, ROWS[:3], plain.job(output=output))
    assert not verify.check(store)
    store.write(f"1{ending}", store.read(f"2{ending}"))
    assert verify.check(store).damaged == {f"1{ending}": 'another image than was recorded: of id "2"'}
    for text in (
        {},
        {"parameters": "5"},
        {"parameters": "no JSON"},
        {"fluxbatch": "5"},
        {"fluxbatch": "no JSON"},
        {"Software": "another"},
    ):  # an editor's, or a prompt too long for JPEG
        store.write(f"1{ending}", encode(plain.pixels(ROWS[1]), format, text=text, png_level=0, quality=50))
        assert not verify.check(store)


def test_a_damaged_word_of_a_lossy_image_about_itself_is_damage(tmp_path):
    output = Output(format=ImageFormat.webp, filename="{i}", quality=50, png_level=1, gallery=False)
    store = open_store(str(tmp_path))
    start(store, ROWS[:2], plain.job(output=output))
    data = store.read("1.webp")
    at = data.index(b"EXIF") + 8  # of the chunk's content
    store.write("1.webp", data[:at] + bytes(20) + data[at + 20 :])
    store.write("0.webp", b"no image")
    found = verify.check(store).damaged
    assert found["1.webp"].startswith("what it says of itself is damaged: ") and " object at 0x" not in "".join(
        found.values()
    )


def test_lossy_images_are_checked_by_their_size(tmp_path):
    output = Output(format=ImageFormat.jpeg, filename="{i}", quality=50, png_level=1, gallery=False)
    store = open_store(str(tmp_path))
    start(store, ROWS[:2], plain.job(output=output))
    assert not verify.check(store)
    store.write("1.jpg", encode(plain.pixels(ROWS[1])[:4], "jpeg", text={}, png_level=0, quality=50))
    assert verify.check(store).damaged == {"1.jpg": "8×4 pixels, but 8×8 were recorded"}


def test_nothing_to_verify(tmp_path, command):
    code, text = command(f"output_dir={tmp_path}", "run_name=nope")
    assert code == 2
    assert text == f"fluxbatch: error: {tmp_path}/nope: no run in it; expected output_dir=… (and run_name=…) of a run\n"


def test_a_place_that_cannot_be_read(run, command):
    (run / "file").write_bytes(b"")
    code, text = command(f"output_dir={run}/flux_0.png", "run_name=x")
    assert code == 2 and text.count("\n") == 1
