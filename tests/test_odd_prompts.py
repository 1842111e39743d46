"""What a start says of prompts that were hardly meant as they stand, and of records that no row stands for."""

from __future__ import annotations

import json

import plain
import pytest
from conftest import metadata
from test_ledger import MemoryStore, open_ledger, run

from fluxbatch.manifest.rows import read_rows
from fluxbatch.reporting import startup_warnings
from fluxbatch.types import Reject


def said(tmp_path, content, name="m.jsonl"):
    path = tmp_path / name
    path.write_text(content, newline="")
    return list(startup_warnings.odd(read_rows(plain.job(manifest=str(path)))[0]))


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        (["nan", "None", "NULL", "NaN", "N/A", "<NA>"], "a word for no value"),
        (["# comment", "// old", "#old", "/* x */", "<!-- x -->"], "a comment"),
        (['--prompt "x"', "a fox --ar 16:9 --v 6"], "with options of another tool"),
        (["a fox -s 20 -W512", "a fox Negative prompt: blur"], "with options of another tool"),
        (["a fox <lora:anime:0.8>", "a (red:1.3) fox"], "with weights or adapters of another tool"),
        (["a {color} fox", "a {red|blue} fox", "a __color__ fox"], "with a placeholder"),
        (['{"prompt": "a fox"}', '["a fox",', "{'prompt': 'a fox'}"], "JSON"),
        (["a fox\ufeffa cat", "caf\ufffd", "a\x1bfox", "a\u2028fox", "a\x85fox"], "with a character that is no text"),
    ],
)
def test_prompts_that_are_hardly_meant_are_counted_in_every_format(tmp_path, prompts, kind):
    good = "a red fox - seen at 10:30 (16:9), 5% off & well-lit, #1, none of it"
    lines = [good, *prompts, good]
    quoted = [json.dumps(text, ensure_ascii=False) for text in lines]
    cells = ['"' + text.replace('"', '""') + '"' for text in lines]
    for name, content, first in (
        ("m.txt", "\n".join(lines), 2),
        ("m.jsonl", "\n".join(f'{{"prompt": {text}}}' for text in quoted), 2),
        ("m.jsonl", "\n".join(f'{{"prompt": "a", "prompt_2": {text}, "num_images": 2}}' for text in quoted), 2),
        ("m.csv", "\n".join(["prompt,seed", *(f"{cell},1" for cell in cells)]), 3),
        ("m.tsv", "\n".join(["prompt\tprompt_2", *(f"a\t{cell}" for cell in cells)]), 3),
    ):
        told = f"{len(prompts)}; the first: {name}:{first}: {json.dumps(prompts[0])[:10]}"
        (line,) = said(tmp_path, content, name)
        assert line.startswith(f"prompts that are {kind}, and drawn as they stand: {told}")


def test_what_looks_like_a_table_is_told_of_a_list_alone(tmp_path):
    header, tab, quotes = said(tmp_path, 'prompt,seed\na fox\t7\n"a fox",\n"a cat"\n', "m.txt")
    assert header.startswith(
        "prompts that are a table's header (name the file .tsv or .csv), and drawn as they stand: 1;"
    )
    assert header.endswith('m.txt:1: "prompt,seed"')
    assert "with a tab" in tab and "stand: 1;" in tab and "in quotes" in quotes and "stand: 2;" in quotes
    assert said(tmp_path, '{"prompt": "\\"a fox\\""}\n{"prompt": "prompt"}\n{"prompt": "a\\tb"}\n') == []


def test_empty_prompts_are_counted(tmp_path):
    assert said(tmp_path, '{"prompt": "a"}\n{"prompt": "", "num_images": 3}\n{"prompt": " "}\n') == [
        'prompts that are empty, and drawn as they stand: 2; the first: m.jsonl:2: ""'
    ]


def test_records_of_no_row_are_counted_and_dropped_only_on_request():
    rows = [plain.row(i, id=f"r{i}") for i in range(5)]
    store = MemoryStore()
    run(store, rows)
    ledger = open_ledger(store)
    assert ledger.remaining(rows) == [] and ledger.unlisted == 0
    changed = [*rows[:2], plain.row(5, id="new")]
    ledger = open_ledger(store)
    assert [row.id for row in ledger.remaining(changed)] == ["new"] and ledger.unlisted == 3
    ledger.merge()
    assert len(store.objects["metadata.jsonl"].splitlines()) == 5
    # a bad line may be the row of any of them
    ledger = open_ledger(store, overwrite=True)
    ledger.remaining(changed, [Reject("m.jsonl:3", "bad", index=2)])
    assert ledger.unlisted == 3 and sum(name.endswith(".png") for name in store.objects) == 5
    ledger = open_ledger(store, overwrite=True)
    assert [row.id for row in ledger.remaining(changed)] == ["new"]
    ledger.merge()
    assert [json.loads(line)["id"] for line in store.objects["metadata.jsonl"].splitlines()] == ["r0", "r1"]
    assert sorted(name for name in store.objects if name.endswith(".png")) == ["flux_0.png", "flux_1.png"]


def test_rows_that_moved_are_no_strangers():
    rows = [plain.row(i) for i in range(4)]  # without ids of their own
    store = MemoryStore()
    run(store, rows)
    ledger = open_ledger(store)
    ledger.remaining([plain.row(0, prompt=rows[2].prompt), plain.row(1, prompt=rows[1].prompt)])
    assert ledger.unlisted == 2


def test_two_manifests_of_one_name_are_two_runs_and_one_that_grows_is_one(cli, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"pretrained_model_name_or_path={golden / 'schnell'}", "max_sequence_length=24", "hardware=cpu"]
    flags += ["output_dir=out", "resolution=32", "num_inference_steps=1", "gallery=false"]
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        assert cli(*flags, f"manifest={name}/prompts.jsonl")[0] == 0
    first, second = (tmp_path / "out").iterdir()
    assert {metadata(run)[0]["prompt"] for run in (first, second)} == {"a", "b"}
    (tmp_path / "a" / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    code, err = cli(*flags, "manifest=a/prompts.jsonl")
    assert code == 0 and "prompts that are empty" in err and "of no row" not in err
    (run_of_a,) = (run for run in (first, second) if metadata(run)[0]["prompt"] == "a")
    assert [line["prompt"] for line in metadata(run_of_a)] == ["a", ""] and len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "a" / "prompts.jsonl").write_text('{"prompt": ""}\n')
    code, err = cli(*flags, "manifest=a/prompts.jsonl")
    assert code == 0 and "records of no row of this manifest: 1; they stay" in err and len(metadata(run_of_a)) == 2
    code, err = cli(*flags, "manifest=a/prompts.jsonl", "overwrite=true")
    assert code == 0 and "overwrite=true drops them" in err and [line["prompt"] for line in metadata(run_of_a)] == [""]
    assert len(list(run_of_a.glob("*.png"))) == 1


def test_sweeps_over_two_manifests_of_one_name_are_two(cli, golden, tmp_path, monkeypatch):
    flags = [f"pretrained_model_name_or_path={golden / 'schnell'}", "max_sequence_length=24", "hardware=cpu"]
    flags += [f"output_dir={tmp_path / 'out'}", "resolution=32", "num_inference_steps=1", "gallery=false", "seed=1"]
    for folder, manifest in (("a", "rows.jsonl"), ("b", "rows.jsonl"), ("b", f"{tmp_path}/a/rows.jsonl")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "rows.jsonl").write_text(f'{{"prompt": "{folder}"}}\n')
        monkeypatch.chdir(tmp_path / folder)
        assert cli("-m", *flags, f"manifest={manifest}")[0] == 0
    prompts = [
        {metadata(run)[0]["prompt"] for run in sweep.iterdir() if run.is_dir()}
        for sweep in (tmp_path / "out").iterdir()
    ]
    assert sorted(map(sorted, prompts)) == [["a"], ["b"]]
