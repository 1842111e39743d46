"""Manifests that would be read as something else without a word: odd line ends, quotes, separators, kinds of file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile

import plain
import pytest

from fluxbatch.config.schema import ManifestErrors
from fluxbatch.manifest.rows import read_rows
from fluxbatch.results.ledger import Ledger
from fluxbatch.storage.registry import open_store
from fluxbatch.types import UserError

QUARANTINE = ManifestErrors["quarantine"]


@pytest.fixture
def manifest(tmp_path):
    """The rows of a manifest: ``manifest(content, name, **job)``; bad lines as messages, without the directory."""

    def read(content, name="m.jsonl", **changes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return read_rows(plain.job(manifest=str(path), **changes))
        except UserError as error:
            return [line.replace(f"{tmp_path}/", "") for line in error.lines]

    return read


def told(result):
    """Prompt, seed and line number of each row."""
    return [(row.prompt, row.seed, int(row.where.rpartition(":")[2])) for row in result[0]]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_line_end_ends_a_line_in_every_format(manifest, end):
    good = [("a", 42, 1), ("b", 43, 2), ("c", 44, 4)]
    assert told(manifest(end.join(["a", "b", "", "c", ""]), "m.txt")) == good
    assert told(manifest(end.join(json.dumps({"prompt": c}) if c else "" for c in ["a", "b", "", "c"]))) == good
    for name, comma in (("m.csv", ","), ("m.tsv", "\t")):
        table = end.join([f"prompt{comma}seed", f"a{comma}1", "", f'"b{end}c"{comma}2', f"d{comma}3"])
        assert told(manifest(table, name)) == [("a", 1, 2), ("b\nc", 2, 4), ("d", 3, 6)]


def test_line_ends_may_be_mixed(manifest):
    assert told(manifest("a\rb\r\nc\nd", "m.txt")) == [("a", 42, 1), ("b", 43, 2), ("c", 44, 3), ("d", 45, 4)]
    assert told(manifest("prompt\tseed\ra\t1\nb\t2\r\n", "m.tsv")) == [("a", 1, 2), ("b", 2, 3)]
    # what other systems show as a line end is none
    assert told(manifest("a\x0b\x0c\x85\u2028\u2029b\n", "m.txt")) == [("a\x0b\x0c\x85\u2028\u2029b", 42, 1)]


@pytest.mark.parametrize(("name", "comma"), [("m.csv", ","), ("m.tsv", "\t")])
def test_a_quoted_cell_may_have_any_number_of_lines(manifest, name, comma):
    text = "\n".join(f'line {i}, 5" wide' for i in range(3_000))
    cell = '"' + text.replace('"', '""') + '"'
    for columns, before, after in ((f"prompt{comma}seed", "", f"{comma}7"), (f"seed{comma}prompt", f"7{comma}", "")):
        table = f"{columns}\n{before}{cell}{after}\n{before}a fox{after}\n"
        assert told(manifest(table, name)) == [(text, 7, 2), ("a fox", 7, 3_002)]
    assert told(manifest('prompt\tseed\tnote\n"a fox\t7\t\na "cat\t8\t\n', "m.tsv")) == [
        ('"a fox', 7, 2),
        ('a "cat', 8, 3),
    ]
    # cells left out at its end make it no other record
    table = f"prompt{comma}seed{comma}note\n{cell}{comma}7\na fox\n"
    assert told(manifest(table, name)) == [(text, 7, 2), ("a fox", 43, 3_002)]


def test_a_quote_that_is_never_closed_is_named_and_costs_only_its_line(manifest):
    lines = "".join(f"line {i},{i}\n" for i in range(200))
    assert manifest(f'prompt,seed\n"a fox,1\n{lines}', "m.csv") == ["m.csv:2: a quote is opened and never closed"]
    rows, rejects = manifest(f'prompt,seed\n"a fox,1\n{lines}', "m.csv", manifest_errors=QUARANTINE)
    assert len(rows) == 200 and len(rejects) == 1
    # in TSV a lone quote is a character of a line that has all its cells, and else a mistake
    tsv = lines.replace(",", "\t")
    assert told(manifest(f'prompt\tseed\n"a fox\t1\n{tsv}', "m.tsv"))[:2] == [('"a fox', 1, 2), ("line 0", 0, 3)]
    assert manifest(f'prompt\tseed\n"a fox\n{tsv}', "m.tsv") == ["m.tsv:2: a quote is opened and never closed"]
    (line, *_) = manifest(f'prompt\tseed\n"a fox\nsays "hi" to\nall"\t3\n{tsv}', "m.tsv")
    assert line == "m.tsv:2: not TSV: '\t' expected after '\"'"


def test_a_cell_without_end_is_never_held(manifest):
    table = 'prompt,seed\n"a fox,1\n' + ("x" * 999_999 + "\n") * 11
    rows, rejects = manifest(table, "m.csv", manifest_errors=QUARANTINE)
    assert rejects[0].reason == "a cell is longer than 10 MB, or a quote is never closed" and len(rows) == 11


def test_an_empty_prompt_is_drawn_where_it_is_written_out(manifest):
    rows, rejects = manifest('{"prompt": ""}\n{"prompt": " ", "seed": 3}\n')
    assert [(row.prompt, row.prompt_2, row.seed) for row in rows] == [("", "", 42), (" ", " ", 3)] and not rejects
    assert manifest("prompt,seed\n,3\n", "m.csv") == ["m.csv:2: prompt: empty"]
    assert manifest("prompt\tseed\n \t3\n", "m.tsv") == ["m.tsv:2: prompt: empty"]
    assert manifest('{"prompt": null}\n') == ["m.jsonl:1: prompt: missing"]
    rows, _ = manifest('{"text": ""}\n', prompt_column="text")
    assert rows[0].prompt == ""


@pytest.mark.parametrize("comma", [";", "|", "\t", ","])
@pytest.mark.parametrize("name", ["m.csv", "m.tsv"])
def test_a_table_is_read_with_the_separator_that_it_has(manifest, name, comma):
    table = f'Prompt{comma}seed\n"a fox{comma} red"{comma}7\na cat{comma}8\n'
    expected = [(f"a fox{comma} red", 7, 2), ("a cat", 8, 3)]
    assert told(manifest(table, name)) == expected
    said = [(prompt, seed, line + 1) for prompt, seed, line in expected]
    assert told(manifest(f"sep={comma}\n{table}", name)) == said
    assert told(manifest(f'\ufeff"sep={comma}"\r\n{table}', name)) == said


def test_other_separators_are_taken_only_where_they_make_the_prompt_column(manifest):
    rows, _ = manifest("prompt\na fox; a cat | a dog\n", "m.csv")
    assert rows[0].prompt == "a fox; a cat | a dog"
    rows, _ = manifest("a;prompt\tseed\nx\t1\n", "m.tsv", prompt_column="a;prompt")
    assert (rows[0].prompt, rows[0].seed) == ("x", 1)
    assert manifest("sep=;\n", "m.csv") == ["m.csv:1: no header line with the column names"]
    assert manifest("a:b\n1:2\n", "m.csv")[0].startswith('m.csv:1: got the columns "a:b", expected prompt')


def zipped(name: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, "x")
    return data.getvalue()


TEXT = 'prompt\n{"prompt": "a fox"}\n'


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (gzip.compress(gzip.compress(TEXT.encode())), "compressed with gzip"),
        (bz2.compress(bz2.compress(TEXT.encode())), "compressed with bzip2"),
        (gzip.compress(lzma.compress(TEXT.encode())), "compressed with xz"),
        (gzip.compress(b"\x28\xb5\x2f\xfd\x24\x10"), "compressed with zstd"),
        (zipped("xl/workbook.xml"), "a zip archive or a spreadsheet"),
        (b"PAR1\x15\x04\x15\x10", "a Parquet file"),
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16"),
        (TEXT.encode("utf-16-be"), "UTF-16"),
        (TEXT.encode("utf-32"), "UTF-16 or UTF-32"),
        (TEXT.encode("utf-32-be"), "UTF-16 or UTF-32"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "a web page"),
        (b"{\\rtf1\\ansi a fox}", "rich text"),
    ],
    ids=lambda value: value.partition("(")[0] if isinstance(value, str) else "file",
)
@pytest.mark.parametrize("name", ["m.jsonl", "m.txt", "m.tsv", "m.csv", "m.json"])
def test_a_file_of_another_kind_is_named_once(manifest, content, cause, name):
    for job in ({}, {"manifest_errors": QUARANTINE}):
        (line,) = manifest(content, name, **job)
        assert line.startswith(f"{name}: the file is {cause}")


def test_json_of_another_shape_is_named(manifest):
    assert manifest('[{"prompt": "a"}]\n')[0].endswith("; of an array, jq -c '.[]' makes them")
    assert "an object a line is expected" in manifest(json.dumps([{"prompt": "a"}], indent=1))[0]
    assert "an object a line is expected" in manifest(json.dumps({"prompt": "a"}, indent=1))[0]
    assert manifest("[]", "m.json") == ["m.json: no rows in it"]
    for text, said in (
        ('{"prompt": "a"}', "m.json: expected an array of objects; an object a line is called .jsonl"),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}]', "m.json:3: not JSON: expected a comma or the array's end at column 1"),
        ('[{"prompt": "a"},\n', "m.json:2: not JSON: Expecting value at column 1"),
        ('[{"prompt": "a"}', "m.json:1: not JSON: expected a comma or the array's end at column 17"),
        ('[{"prompt": "a"},\n{"prompt" "b"}]', "m.json:2: not JSON: Expecting ':' delimiter at column 11"),
        ('[{"prompt": "a"}] 7', 'm.json: "7" after the array\'s end'),
        ('[{"prompt": "a"}, 7,\n {"prompt": "b", "prompt": "c"}]', "m.json:1: got 7 (number), expected an object"),
        ("[" * 100_000, "m.json:1: not JSON: cannot be read at column 2"),
    ):
        assert manifest(text, "m.json")[0].startswith(said)


def test_latin_1_is_guessed(manifest):
    (line,) = manifest("a café\n".encode("latin-1"), "m.txt")
    assert line == "m.txt:1: not UTF-8: byte 0xe9 at column 6; is it Latin-1 or Windows-1252? Save the file as UTF-8"


def test_an_id_that_is_a_whole_number_is_one_text_however_it_is_written(manifest):
    jsonl = "".join(f'{{"prompt": "a", "id": {id}}}\n' for id in ("12", "13.0", '"14"', "-1.5e1", "null"))
    assert [row.id for row in manifest(jsonl)[0]] == ["12", "13", "14", "-15", "4"]
    for name, comma in (("m.csv", ","), ("m.tsv", "\t")):
        cells = ("12.0", "13", " 14.", "-15.0", "", "007", "1.10", "v1.0")
        table = f"prompt{comma}id\n" + "".join(f"a{comma}{cell}\n" for cell in cells)
        assert [row.id for row in manifest(table, name)[0]] == ["12", "13", "14", "-15", "4", "007", "1.10", "v1.0"]
    (line,) = manifest('{"prompt": "a", "id": 12}\n{"prompt": "b", "id": "12"}\n{"prompt": "c", "id": "12.0"}\n')
    assert line.startswith('m.jsonl:2: id: "12" is already that of')
    assert "expected a string" in manifest('{"prompt": "a", "id": 1e300}\n')[0]


def test_every_integer_may_be_a_whole_float(manifest):
    fields = {"seed": 7, "height": 32, "width": 48, "num_inference_steps": 3, "num_images": 2}
    jsonl, _ = manifest(json.dumps({"prompt": "a", **{key: float(value) for key, value in fields.items()}}))
    cells = [f"{value}.0" for value in fields.values()]
    table, _ = manifest(",".join(["prompt", *fields]) + "\n" + ",".join(["a", *cells]), "m.csv")
    for rows in (jsonl, table):
        numbers = [(row.seed, row.height, row.width, row.num_inference_steps) for row in rows]
        assert numbers == [(7, 32, 48, 3), (8, 32, 48, 3)]


def test_files_that_were_joined(manifest):
    one = "\ufeffa fox\n"
    assert [row.prompt for row in manifest(one * 3, "m.txt")[0]] == ["a fox"] * 3
    assert [row.prompt for row in manifest('\ufeff{"prompt": "a fox"}\n' * 2)[0]] == ["a fox"] * 2
    table = "\ufeffprompt,note\na fox,x\n"
    assert manifest(table * 2, "m.csv") == ["m.csv:3: the header once more; are these two files in one?"]


def test_a_reject_of_a_line_keeps_its_prompt(manifest, tmp_path):
    for content, name in (
        ("caption\tseed\na fox\tx\n", "m.tsv"),
        ('caption,seed\n"a fox",x\n', "m.csv"),
        ('{"caption": "a fox", "seed": "x"}\n', "m.jsonl"),
    ):
        rows, rejects = manifest(content, name, manifest_errors=QUARANTINE, prompt_column="caption")
        ledger = Ledger(open_store(str(tmp_path / f"out-{name}")), {}, writer_id="one")
        ledger.remaining(rows, rejects)
        ledger.merge()
        (line, *_) = map(json.loads, (tmp_path / f"out-{name}/rejects.jsonl").read_text().splitlines())
        assert line["prompt"] == "a fox" and line["reason"].startswith("seed: got")
    _, rejects = manifest('{"prompt": "a"}\n{\n{"prompt": 7}\n', manifest_errors=QUARANTINE)
    assert [reject.prompt for reject in rejects] == [None, None]
