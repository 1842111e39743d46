"""File names by template: each row its own, and the same at every start."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxbatch.results.file_names import Namer
from fluxbatch.results.ledger import Ledger
from fluxbatch.storage.local import LocalStore
from fluxbatch.types import UserError


def names_of(template, rows, taken=()):
    return Namer(template, ".png").assign(rows, taken)


def test_templates():
    assert names_of("{thousand:03}/{i:06}", [plain.row(73_214)]) == {73_214: "073/073214.png"}
    row = plain.row(7, id="cat", seed=5)
    for template, name in (
        ("flux_{i}", "flux_7.png"),
        ("flux_{i:05d}.png", "flux_00007.png"),
        ("{id}", "cat.png"),
        ("{seed}/{id}-{i}", "5/cat-7.png"),
        ("plain", "plain.png"),
    ):
        assert names_of(template, [row]) == {7: name}


@pytest.mark.parametrize(
    "template",
    [
        "../{i}",
        "/tmp/{i}",
        "{i}/../../x",
        "{x}",
        "{i.real}",
        "{id[0]}",
        "{}",
        "{i",
        "{i:{seed}}",
        ".{i}",
        "a/.b/{i}",
        "a\\{i}",
        "{i!r:>0}{q}",
        "{i:q}",
        "a\n{i}",
    ],
)
def test_templates_cannot_leave_the_output_place(template):
    with pytest.raises(
        UserError, match=r"output.filename: got .*expected a file name with \{i\}, \{thousand\}, \{id\} or \{seed\}"
    ):
        Namer(template, ".png")


def test_no_name_is_given_twice():
    rows = [plain.row(0, id="Cat", seed=1), plain.row(1, id="cat", seed=1), plain.row(2, id="contact_sheet", seed=1)]
    assert names_of("{id}", rows) == {0: "Cat.png", 1: "cat_1.png", 2: "contact_sheet.png"}
    assert names_of("{seed}", rows) == {0: "1.png", 1: "1_1.png", 2: "1_2.png"}
    assert names_of("flux_{i}", rows, ["flux_1.png", "flux_3.png"]) == {
        0: "flux_0.png",
        2: "flux_2.png",
        1: "flux_4.png",
    }


def test_names_that_some_file_systems_take_for_one_are_told_apart():
    ids = ("caf\u00e9", "cafe\u0301", "CAFE\u0301", "\u212bngstr\u00f6m", "\u00e5ngstro\u0308m")
    rows = [plain.row(k, id=id) for k, id in enumerate(ids)]
    expected = {
        0: "caf\u00e9.png",
        1: "cafe\u0301_1.png",
        2: "CAFE\u0301_2.png",
        3: "\u212bngstr\u00f6m.png",
        4: "\u00e5ngstro\u0308m_1.png",
    }
    assert names_of("{id}", rows) == expected
    assert names_of("{id}", rows[1:2], ["caf\u00e9.png"]) == {1: "cafe\u0301_1.png"}


def test_a_name_that_no_file_can_have_is_told_before_anything_is_drawn():
    row = plain.row(0, id="é" * 100)
    assert names_of("{id}" + "x" * 51, [row])[0].endswith("x.png")  # 255 bytes
    with pytest.raises(
        UserError, match=r"output.filename=.*: m.jsonl:1: got a name of 256 bytes, expected at most 255"
    ):
        names_of("{id}" + "x" * 52, [row])
    with pytest.raises(UserError, match="got a name of 257 bytes"):  # with what tells it from the other
        names_of("{id}" + "x" * 51, [row, dataclasses.replace(row, index=1)])
    assert names_of("a" * 250 + "/{id}", [row])


@pytest.mark.parametrize(
    ("template", "id"),
    [("index.html/{i}", "x"), ("Metadata.jsonl/{i}", "x"), ("{id}/{i}", "status.json"), ("config.yaml/a/{i}", "x")],
)
def test_no_folder_has_the_name_of_a_file_that_a_run_writes(template, id):
    with pytest.raises(UserError, match=r"output.filename=.*: m.jsonl:1: got .*/0.*, expected another folder"):
        names_of(template, [plain.row(0, id=id)])
    assert names_of("sub/" + template, [plain.row(0, id=id)])


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(8)),
    st.sets(st.integers(0, 12)),
    st.sets(st.integers(0, 7)),
    st.sampled_from(["f_{i}", "{seed}"]),
)
def test_names_do_not_change_while_rows_get_done(order, taken, done, template):
    rows = [plain.row(k, seed=k % 3) for k in order]
    taken = [template.format(i=k, seed=k % 3) + ".png" for k in taken]
    names = names_of(template, rows, taken)
    assert len({*names.values(), *taken}) == 8 + len({*taken})
    left = [row for row in rows if row.index not in done]
    assert names_of(template, sorted(rows, key=lambda row: row.index), taken) == names
    later = names_of(template, left, [*taken, *(names[k] for k in done)])
    assert later == {row.index: names[row.index] for row in left}


def test_a_name_that_the_locale_cannot_write_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    rows = [plain.row(0), plain.row(1, id="äpfel")]
    assert Namer("{id}", ".png", "ascii").assign(rows[:1], []) == {0: "0.png"}
    with pytest.raises(UserError, match=r"m.jsonl:2: got 'äpfel.png', expected ascii, .*PYTHONUTF8=1"):
        Namer("{id}", ".png", "ascii").assign(rows, [])
    with pytest.raises(UserError, match="expected utf-8"):
        Namer("\udcff_{i}", ".png").assign(rows, [])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    ledger = Ledger(LocalStore(str(tmp_path)), {}, writer_id="one")
    assert ledger.names(rows, "{i}", ".png") == {0: "0.png", 1: "1.png"}
    with pytest.raises(UserError, match="m.jsonl:2: got 'äpfel.png'"):
        ledger.names(rows, "{id}", ".png")


def test_places_that_the_locale_cannot_write_are_one_line():
    script = r"""if True:
        from fluxbatch.storage.base import StorageError
        from fluxbatch.storage.local import LocalStore
        from fluxbatch.storage.registry import open_stream
        store = LocalStore("\xe4")
        for act in (open_stream("\xe4.jsonl").__enter__, lambda: store.write("a", b""), lambda: store.read("a")):
            try:
                act()
            except StorageError as error:
                print(str(error).encode("ascii", "backslashreplace").decode())
    """
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env)
    why = "file names are ascii by this locale: set PYTHONUTF8=1 or a UTF-8 locale"
    lines = [f"{place}: {why}" for place in (r"\xe4.jsonl", r"\xe4/a", r"\xe4/a")]
    assert done.stdout.decode().splitlines() == lines, done.stderr
