"""The manifest: every good line becomes its rows, and every bad one is named with its reason."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import subprocess
import sys
import time

import plain
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxbatch.config.schema import LoraAdapter, ManifestErrors
from fluxbatch.manifest import formats
from fluxbatch.manifest.fields import MAX_SEED
from fluxbatch.manifest.rows import read_rows
from fluxbatch.types import UserError

QUARANTINE = ManifestErrors["quarantine"]


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest and reads its rows: ``manifest(content, name="m.jsonl", **job)``."""

    def read(content, name="m.jsonl", **changes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_rows(plain.job(manifest=str(path), **changes))

    return read


@pytest.fixture
def problems(manifest, tmp_path):
    """The lines of the UserError, without the directory of the file."""

    def read(content, name="m.jsonl", **changes):
        with pytest.raises(UserError) as error:
            manifest(content, name, **changes)
        return [line.replace(f"{tmp_path}/", "") for line in error.value.lines]

    return read


def test_unset_fields_come_from_the_job(manifest):
    rows, rejects = manifest('{"prompt": "a red apple"}\n\n{"prompt": "a pear", "prompt_2": "green", "seed": 7}\n')
    assert not rejects
    apple, pear = rows
    assert (apple.index, apple.id, apple.named, apple.prompt_2, apple.seed) == (0, "0", False, "a red apple", 42)
    assert (pear.index, pear.id, pear.prompt_2, pear.seed) == (1, "1", "green", 7)
    assert (apple.height, apple.width, apple.num_inference_steps, apple.guidance_scale) == (64, 64, 4, 0.0)
    assert apple.lora is None and pear.where.endswith("m.jsonl:3")


def test_a_second_prompt_for_all(manifest):
    rows, _ = manifest('{"prompt": "a"}\n{"prompt": "b", "prompt_2": "own"}\n', prompt_2="in oil")
    assert [row.prompt_2 for row in rows] == ["in oil", "own"]
    with pytest.raises(UserError, match="^prompt_2: empty$"):
        read_rows(plain.job(prompt="a", prompt_2=" "))


def test_every_field_of_a_line(manifest):
    line = {
        "id": "cat",
        "prompt": "a cat",
        "seed": MAX_SEED,
        "height": 32,
        "width": 128,
        "num_inference_steps": 20,
        "guidance_scale": 4,
        "lora": {"pixel": 0.5, "anime": 1},
        "category": "animals",
        "nested": {"a": [1, None]},
    }
    adapters = {"anime": LoraAdapter(path="a"), "pixel": LoraAdapter(path="b")}
    (row,), _ = manifest(json.dumps(line), lora=adapters)
    assert (row.id, row.named, row.seed, row.height, row.width) == ("cat", True, MAX_SEED, 32, 128)
    assert row.guidance_scale == 4.0 and type(row.guidance_scale) is float
    assert row.lora == (("anime", 1.0), ("pixel", 0.5))
    assert row.extra == {"category": "animals", "nested": {"a": [1, None]}}


def test_rows_of_several_images(manifest):
    rows, _ = manifest(
        '{"prompt": "a", "id": "cat", "num_images": 3, "seed": 5}\n{"prompt": "b", "num_images": 2}\n{"prompt": "c"}\n'
    )
    assert [row.id for row in rows] == ["cat-0", "cat-1", "cat-2", "3", "4", "5"]
    assert [row.seed for row in rows] == [5, 6, 7, 45, 46, 47]
    assert [row.index for row in rows] == list(range(6))
    rows, _ = manifest('{"prompt": "a"}\n{"prompt": "b", "num_images": 1}\n', num_images=2)
    assert [row.id for row in rows] == ["0", "1", "2"]


def test_text_file(manifest):
    rows, _ = manifest("\ufeffa cat\r\n\r\n  a dog, on a \u2028 mat  \n", name="m.txt")
    assert [row.prompt for row in rows] == ["a cat", "a dog, on a \u2028 mat"]
    assert rows[1].where.endswith("m.txt:3")


def test_tables(manifest):
    rows, _ = manifest(
        "Prompt,Seed,height,note,guidance_scale,id\n"
        "a cat,7,32,,3.5,\n"
        '"a ""big"", red\nthing",,,"x, y",,second\n'
        'a 5" pipe\n',
        name="m.csv",
    )
    assert [row.prompt for row in rows] == ["a cat", 'a "big", red\nthing', 'a 5" pipe']
    assert [row.id for row in rows] == ["0", "second", "2"]
    assert (rows[0].seed, rows[0].height, rows[0].guidance_scale) == (7, 32, 3.5)
    assert (rows[1].seed, rows[1].height, rows[1].extra) == (43, 64, {"note": "x, y"})
    assert rows[2].where.endswith("m.csv:5")


def test_the_prompt_column_is_found_or_named(manifest, problems):
    table = "text\tCAPTION\nold\ta cat\n"
    rows, _ = manifest(table, name="m.tsv")
    assert (rows[0].prompt, rows[0].extra) == ("a cat", {"text": "old"})
    rows, _ = manifest(table, name="m.tsv", prompt_column="text")
    assert (rows[0].prompt, rows[0].extra) == ("old", {"CAPTION": "a cat"})
    assert problems(table, name="m.tsv", prompt_column="words") == [
        'm.tsv:1: got the columns "text", "CAPTION", expected "words"'
    ]
    assert "expected prompt, caption or text" in problems("a\tb\n1\t2\n", name="m.tsv")[0]
    rows, _ = manifest('{"caption": "a cat", "prompt": "not this"}', prompt_column="caption")
    assert rows[0].prompt == "a cat"


def test_an_unclosed_quote_costs_only_its_line(manifest, problems):
    table = 'prompt,seed\n"a cat,1\na dog,2\n"a "bad" quote",3\na "word" inside,4\n'
    rows, rejects = manifest(table, name="m.csv", manifest_errors=QUARANTINE)
    assert [row.prompt for row in rows] == ["a dog", 'a "word" inside']
    assert [reject.where.rpartition(":")[2] for reject in rejects] == ["2", "4"]
    # in TSV a lone quote is a character
    rows, _ = manifest('prompt\tseed\n"Hello" said the cat\t1\n"lone\t2\n"two words"\t3\n', name="m.tsv")
    assert [row.prompt for row in rows] == ['"Hello" said the cat', '"lone', "two words"]


def test_a_quoted_cell_keeps_its_lines_as_they_are(manifest):
    for name, comma in (("m.csv", ","), ("m.tsv", "\t")):
        table = f'prompt{comma}seed\r\n"first\r\n\r\n   second  \r\n "" third"{comma}3\r\n\r\n  a cat{comma}4  \r\n'
        rows, _ = manifest(table, name=name)
        assert [(row.prompt, row.seed) for row in rows] == [('first\n\n   second  \n " third', 3), ("a cat", 4)]
        assert rows[1].where.endswith(f"{name}:7")


def test_a_quote_in_tsv_opens_a_cell_only_where_the_record_has_one_cell_a_column(manifest):
    rows, _ = manifest('prompt\tseed\n"a fox\nin snow"\t28\na cat\t3\n', name="m.tsv")
    assert [(row.prompt, row.seed) for row in rows] == [("a fox\nin snow", 28), ("a cat", 3)]
    rows, _ = manifest('prompt\tnote\tseed\n"a fox\tx\t1\na sign, 5"\n"a dog\ty\n', name="m.tsv")
    assert [(row.prompt, row.seed) for row in rows] == [('"a fox', 1), ('a sign, 5"', 43), ('"a dog', 44)]
    rows, _ = manifest(
        'prompt\tseed\n"Welcome\t1\na cat\t2\nhome"\t3\n', name="m.tsv"
    )  # each line is a record by itself
    assert [(row.prompt, row.seed) for row in rows] == [('"Welcome', 1), ("a cat", 2), ('home"', 3)]
    rows, _ = manifest('prompt\n"a fox\n"a" dog\n', name="m.tsv")
    assert [row.prompt for row in rows] == ['"a fox', '"a" dog']


def test_what_spreadsheets_write_of_empty_cells_means_nothing(manifest, problems):
    table = "prompt,seed,,\r\na fox,3,, \r\n,,,\r\n , \r\na cat\r\n"
    for name, comma in (("m.csv", ","), ("m.tsv", "\t")):
        rows, rejects = manifest(table.replace(",", comma), name=name)
        assert [(row.prompt, row.seed, row.extra) for row in rows] == [
            ("a fox", 3, {}),
            ("a cat", 43, {}),
        ] and not rejects
        assert rows[1].where.endswith(f"{name}:5")
    assert problems("prompt,seed,\na,1,note\n,1,\n", name="m.csv") == [
        "m.csv:2: 3 cells, but the header names 2 columns",
        "m.csv:3: prompt: empty",
    ]
    rows, _ = manifest('prompt\tseed\t\t\n"a fox\nin snow"\t3\t\n"a lone quote\t4\t\t\n', name="m.tsv")
    assert [(row.prompt, row.seed) for row in rows] == [("a fox\nin snow", 3), ('"a lone quote', 4)]


def test_whole_floats_are_integers(manifest):
    """As pandas writes a column of integers with a gap."""
    for content, name in (
        ('{"prompt": "a", "seed": 28.0, "num_inference_steps": 2e1}\n{"prompt": "b", "seed": null}\n', "m.jsonl"),
        ("prompt,seed,num_inference_steps\na,28.0,20.\nb,,\n", "m.csv"),
    ):
        rows, _ = manifest(content, name=name)
        assert [(row.seed, row.num_inference_steps) for row in rows] == [(28, 20), (43, 4)]
        assert all(type(number) is int for row in rows for number in (row.seed, row.num_inference_steps))


def test_single_prompt():
    (row,), rejects = read_rows(plain.job(prompt="a cat", prompt_2="cute"))
    assert (row.prompt, row.prompt_2, row.seed, row.id) == ("a cat", "cute", 42, "0") and not rejects
    assert len(read_rows(plain.job(prompt="a cat", num_images=3))[0]) == 3
    with pytest.raises(UserError, match="prompt=: prompt: empty"):
        read_rows(plain.job(prompt="  "))
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(plain.job(prompt="\udcff"))
    with pytest.raises(UserError, match="nothing to do"):
        read_rows(plain.job())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "a"} x', "not JSON: Extra data at column 17"),
        ("[1]", 'got an array, expected an object like {"prompt": "a red apple"}'),
        ('"a cat"', 'got "a cat" (string), expected an object like {"prompt": "a red apple"}'),
        ("null", 'got null, expected an object like {"prompt": "a red apple"}'),
        ("{}", "prompt: missing"),
        ('{"prompt": null}', "prompt: missing"),
        (
            '{"Prompt": "a", "seed": 3, "caption": "b", "n": 1}',
            'prompt: missing (prompt_column=… takes another field for it, of "Prompt", "caption")',
        ),
        ('{"prompt": "a", "prompt_2": ""}', "prompt_2: empty"),
        ('{"prompt": 7}', "prompt: got 7 (number), expected a string"),
        ('{"prompt": "a\\u0000b"}', "prompt: contains a NUL character"),
        ('{"prompt": "a", "prompt_2": ["b"]}', "prompt_2: got an array, expected a string"),
        ('{"prompt": "a", "prompt": "b"}', '"prompt" is given more than once'),
        ('{"prompt": "a", "seed": "7"}', 'seed: got "7" (string), expected an integer'),
        ('{"prompt": "a", "seed": 7.5}', "seed: got 7.5 (number), expected an integer"),
        ('{"prompt": "a", "seed": 1e19}', "seed: got 1e+19 (number), expected an integer"),
        ('{"prompt": "a", "seed": true}', "seed: got true (boolean), expected an integer"),
        ('{"prompt": "a", "seed": -1}', "seed: got -1, expected an integer from 0 to 2**64 - 1"),
        ('{"prompt": "a", "seed": 18446744073709551616}', "seed: got 18446744073709551616, expected"),
        ('{"prompt": "a", "seed": 18446744073709551615, "num_images": 2}', "seed: 18446744073709551616 is more"),
        ('{"prompt": "a", "height": 0}', "height: got 0, expected a multiple of 16 from 16 to 16384"),
        ('{"prompt": "a", "width": 100}', "width: got 100, expected a multiple of 16 from 16 to 16384"),
        ('{"prompt": "a", "height": 1000000000000}', "height: got 1000000000000, expected a multiple"),
        ('{"prompt": "a", "num_inference_steps": 0}', "num_inference_steps: got 0, expected an integer from 1 to 1000"),
        ('{"prompt": "a", "num_inference_steps": 1001}', "num_inference_steps: got 1001, expected"),
        ('{"prompt": "a", "num_images": 0}', "num_images: got 0, expected an integer from 1"),
        ('{"prompt": "a", "guidance_scale": "3.5"}', 'guidance_scale: got "3.5" (string), expected a number'),
        ('{"prompt": "a", "guidance_scale": -1}', "guidance_scale: got -1, expected a number from 0"),
        ('{"prompt": "a", "guidance_scale": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "guidance_scale": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "a", "note": 1e999}', "1e999 is too large for a number"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "a number has too many digits"),
        ('{"prompt": "a", "note": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "lora": "anime"}', 'lora: got "anime" (string), expected an object like'),
        ('{"prompt": "a", "lora": {"animee": 1}}', 'lora: no adapter "animee" in this job (it has anime)'),
        ('{"prompt": "a", "lora": {"anime": "1"}}', 'lora.anime: got "1" (string), expected a number'),
        ('{"prompt": "a", "id": ""}', 'id: got "", expected 1 to 200 bytes'),
        ('{"prompt": "a", "id": "../x"}', 'id: got "../x", expected'),
        ('{"prompt": "a", "id": "a/b"}', 'id: got "a/b", expected'),
        ('{"prompt": "a", "id": "a\\\\b"}', 'id: got "a\\\\b", expected'),
        ('{"prompt": "a", "id": ".hidden"}', 'id: got ".hidden", expected'),
        ('{"prompt": "a", "id": "a\\nb"}', 'id: got "a\\nb", expected'),
        ('{"prompt": "a", "id": "' + "é" * 101 + '"}', "id: got"),
        ('{"prompt": "a", "id": 1.5}', "id: got 1.5 (number), expected a string"),
        ('{"prompt": "a\0"}', "contains a NUL byte"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at column 13"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "x": ' + '{"y":' * 50_000, "nested too deeply"),
    ],
)
def test_bad_lines(problems, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    found = problems(b'{"prompt": "good"}\n' + line + b"\n", lora={"anime": LoraAdapter(path="a")})
    assert len(found) == 1
    assert found[0].startswith(f"m.jsonl:2: {reason}"), found[0][:300]


def test_every_problem_of_a_line_and_every_bad_line_are_named(problems):
    found = problems('{"seed": "7", "height": 30}\n{"prompt": "a"}\nx\n')
    assert found == [
        'm.jsonl:1: prompt: missing; seed: got "7" (string), expected an integer; '
        "height: got 30, expected a multiple of 16 from 16 to 16384",
        "m.jsonl:3: not JSON: Expecting value at column 1",
    ]
    found = problems("x\n" * 80)
    assert len(found) == 51 and found[-1] == "… and 30 more bad lines"


def test_duplicate_ids(problems, manifest):
    content = '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n{"prompt": "c", "id": "3"}\n{"prompt": "d"}\n'
    first, second = problems(content)
    assert first.startswith('m.jsonl:2: id: "x" is already that of ') and first.endswith("m.jsonl:1")
    assert second.startswith('m.jsonl:4: id: "3" (its number, as it gives none) is already that of ')
    rows, _ = manifest(content, manifest_errors=QUARANTINE)
    assert [row.prompt for row in rows] == ["a", "c"]
    assert "cat-1" in problems('{"prompt": "a", "id": "cat-1"}\n{"prompt": "b", "id": "cat", "num_images": 2}\n')[0]


def test_indices_do_not_depend_on_which_lines_are_bad(manifest):
    good = [json.dumps({"prompt": f"p{k}", "id": f"r{k}"}) for k in range(10)]
    everything = {row.id: row for row in manifest("\n".join(good))[0]}
    for bad in ({0}, {3, 4}, {9}, set(range(0, 10, 2))):
        content = "\n".join("{" if k in bad else line for k, line in enumerate(good))
        rows, rejects = manifest(content, manifest_errors=QUARANTINE)
        assert {row.id: row for row in rows} == {id: row for id, row in everything.items() if int(id[1:]) not in bad}
        assert [reject.index for reject in rejects] == sorted(bad)


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "m.jsonl", "m.jsonl: no rows in it"),
        (b"\n \n", "m.txt", "m.txt: no rows in it"),
        (b"", "m.csv", "m.csv:1: no header line with the column names"),
        (b"prompt,seed\n", "m.csv", "m.csv: no rows in it"),
        (b"prompt,seed,seed\na,1,2\n", "m.csv", 'm.csv:1: column "seed" is there more than once'),
        (
            b"Style,style,id,prompt,ID\n1,2,a,b,c\n",
            "m.csv",
            'm.csv:1: columns "id" and "ID" differ only in case, expected one of them',
        ),
        (b"prompt,seed\na,b,c\n", "m.csv", "m.csv:2: 3 cells, but the header names 2 columns"),
        (b"prompt,seed\na,7.5\n", "m.csv", 'm.csv:2: seed: got "7.5" (string), expected an integer'),
        (b"prompt,guidance_scale\na,nan\n", "m.csv", "m.csv:2: guidance_scale: got NaN, expected a number from 0"),
        (b"prompt,lora\na,{\n", "m.csv", 'm.csv:2: lora: got "{" (string), expected an object'),
        (b"[]", "m.json", "m.json: no rows in it"),
        (
            '{"prompt": "a"}'.encode("utf-16"),
            "m.jsonl",
            "m.jsonl: the file is UTF-16 or UTF-32; save it as UTF-8",
        ),
        ("prompt\tseed\na\t1\n".encode("utf-16"), "m.tsv", "m.tsv: the file is UTF-16 or UTF-32; save it as UTF-8"),
    ],
)
def test_bad_files(problems, content, name, reason):
    (line,) = problems(content, name)
    assert line.startswith(reason)


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"manifest: .*nope.jsonl: no such file"):
        read_rows(plain.job(manifest=str(tmp_path / "nope.jsonl")))
    with pytest.raises(UserError, match=r"manifest: .*is a directory"):
        read_rows(plain.job(manifest=str(tmp_path)))
    with pytest.raises(UserError, match="expected a local path, gs://"):
        read_rows(plain.job(manifest="ftp://bucket/m.jsonl"))
    with pytest.raises(UserError, match="both given"):
        read_rows(plain.job(manifest="m.jsonl", prompt="a"))


def test_a_path_that_is_no_utf_8_can_be_written_into_records_and_rejects(manifest):
    rows, rejects = manifest('{"prompt": "a"}\n{\n', name=os.fsdecode(b"h\xff.jsonl"), manifest_errors=QUARANTINE)
    assert [place.where.rpartition("/")[2] for place in (*rows, *rejects)] == ["h\\udcff.jsonl:1", "h\\udcff.jsonl:2"]


def test_a_bad_setting_of_the_job_is_named_by_its_key():
    job = plain.job(prompt="a", seed=-1)
    job.sampler.resolution = 100
    with pytest.raises(UserError) as error:
        read_rows(job)
    assert error.value.lines == (
        "seed: got -1, expected an integer from 0 to 2**64 - 1",
        "sampler.resolution: got 100, expected a multiple of 16 from 16 to 16384",
    )
    with pytest.raises(UserError, match="multiple of 48"):
        read_rows(plain.job(prompt="a"), size_multiple=48)


def test_a_long_line_is_never_held(manifest):
    class Endless(io.RawIOBase):
        """100 MB without a line end, then a good line; counts what is asked for at once."""

        left = 100_000_000
        tail = b'\n{"prompt": "good"}\n'
        largest = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.largest = max(self.largest, len(buffer))
            data = b"x" * min(self.left, len(buffer)) or self.tail[: len(buffer)]
            self.tail = self.tail if self.left else self.tail[len(data) :]
            self.left -= min(self.left, len(data))
            buffer[: len(data)] = data
            return len(data)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = Endless()
    first, second = formats.json_lines(io.BufferedReader(stream))
    assert str(first.fields) == "longer than 10 MB" and second == (2, {"prompt": "good"})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


def test_a_hundred_thousand_rows_are_read_in_seconds(manifest):
    content = "".join(
        json.dumps({"id": f"row-{i}", "prompt": f"a cat number {i}", "seed": i, "guidance_scale": 3.5, "x": "y"}) + "\n"
        for i in range(100_000)
    )
    start = time.process_time()
    rows, _ = manifest(content)
    assert len(rows) == 100_000
    assert time.process_time() - start < 6.0  # 1.5 s when measured alone


def test_reading_imports_neither_jax_nor_google_cloud():
    script = (
        "import sys, fluxbatch.manifest.rows, fluxbatch.results.writer; assert not {'jax', 'google.cloud.storage'} "
        "& {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- hostile lines -------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
likely = {
    "prompt": st.text(max_size=30) | json_values,
    "prompt_2": st.text(max_size=30) | json_values,
    "id": st.text(max_size=10) | st.sampled_from(["../x", "a/b", "a", "b", ".x", "\x00"]) | json_values,
    "seed": st.integers(-2, 2**65) | json_values,
    "height": st.sampled_from([16, 64, 100, 0, -16, 10**30, "64"]) | json_values,
    "num_inference_steps": st.integers(-1, 1100) | json_values,
    "guidance_scale": st.floats() | json_values,
    "num_images": st.integers(-1, 4) | json_values,
    "lora": json_values,
    "note": json_values,
}
objects = st.fixed_dictionaries({}, optional=likely).map(lambda value: json.dumps(value).encode())
hostile = (
    st.one_of(
        objects,
        objects,
        json_values.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        st.binary(max_size=60),
        st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.tuples(objects, st.integers(0, 200), st.integers(0, 255)).map(  # one byte changed
            lambda t: t[0][: t[1]] + bytes([t[2]]) + t[0][t[1] + 1 :]
        ),
        st.sampled_from([b"[" * 5000, b'{"prompt":' * 3000, b"\x00", b"\xef\xbb\xbf{}", b"\r", b'{"prompt": "a"}\r']),
    )
    .map(lambda line: line.replace(b"\n", b""))
    .map(lambda line: line[:-1].replace(b"\r", b"") + line[-1:])
)


def read_hostile(tmp_path, content: list[bytes]) -> None:
    """Good lines among bad ones: each good one gives its row, each bad one its number."""
    mixed = [b'{"prompt": "first"}']  # the first line tells what kind of file it is
    for k, line in enumerate(content):
        mixed += [line, json.dumps({"prompt": f"good {k}", "id": f"good-{k}!"}).encode()]
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(mixed))
    rows, rejects = read_rows(plain.job(manifest=str(path), manifest_errors=QUARANTINE))

    good = {row.id: row for row in rows if row.id.endswith("!")}
    assert [good[f"good-{k}!"].prompt for k in range(len(content))] == [f"good {k}" for k in range(len(content))]
    accounted = {int(row.where.rpartition(":")[2]) for row in rows} | {
        int(reject.where.rpartition(":")[2]) for reject in rejects
    }
    blank = {2 * k + 2 for k, line in enumerate(content) if not line.removeprefix(b"\xef\xbb\xbf").strip()}
    assert accounted | blank == set(range(1, len(mixed) + 1))
    assert len({row.id for row in rows}) == len(rows)
    indices = [row.index for row in rows] + [reject.index for reject in rejects]
    assert sorted(indices) == list(range(len(indices)))
    for row in rows:
        assert 0 <= row.seed <= MAX_SEED and row.height % 16 == 0 < row.height
        assert 1 <= row.num_inference_steps <= 1000 and math.isfinite(row.guidance_scale)
        assert not {"/", "\\", "\0"} & {*row.id} and row.id[0] != "."
        json.dumps([row.prompt, row.prompt_2, row.id, row.extra], allow_nan=False, ensure_ascii=False).encode()
    for reject in rejects:
        assert reject.reason and "\n" not in reject.reason
        reject.reason.encode()


_no_checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]


@settings(max_examples=30, deadline=None, suppress_health_check=_no_checks)
@given(st.lists(hostile, min_size=10, max_size=10))
def test_hostile_lines(tmp_path, content):
    read_hostile(tmp_path, content)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=_no_checks)
@given(st.lists(hostile, min_size=10, max_size=10))
def test_ten_thousand_hostile_lines(tmp_path, content):
    read_hostile(tmp_path, content)


@settings(max_examples=100, deadline=None, suppress_health_check=_no_checks)
@given(
    st.lists(st.text(alphabet='ab",\t\r é\0', max_size=12), max_size=8), st.sampled_from(["m.csv", "m.tsv", "m.txt"])
)
def test_hostile_tables(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes("\n".join(["prompt,seed" if name == "m.csv" else "prompt\tseed", *content, "good"]).encode())
    rows, rejects = read_rows(plain.job(manifest=str(path), manifest_errors=QUARANTINE))
    assert rows[-1].prompt == "good"
    assert all(reject.reason for reject in rejects)
