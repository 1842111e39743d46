"""The documentation: its examples run, its links lead somewhere, what it lists is what there is."""

import ast
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from fluxbatch.config import overrides, reference
from fluxbatch.config.schema import Job
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.models.family import Family
from fluxbatch.types import Exit

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "jobs/docs"
README, COMMUNITY = ROOT / "README.md", sorted((ROOT / ".github").rglob("*.md"))
PAGES = [README, *sorted(DOCS.glob("*.md"))]
ALL = [*PAGES, *COMMUNITY, *sorted(ROOT.glob("jobs/**/README.md"))]

BLOCK = re.compile(r"^```(\w*) *(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKS = {
    "run": "every command is run, in one directory for each page",
    "compose": "every command's configuration is composed: its models, buckets or devices are not here",
    "shell": "other programs are called: what of the checkout they name must be there",
}


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """(language, mark, text) of the fenced blocks."""
    return BLOCK.findall(page.read_text("utf-8"))


def commands(text):
    """Each command's words, without comments and variables before it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def marked(page, *marks):
    texts = (text for language, mark, text in blocks(page) if language == "sh" and mark in marks)
    return [command for text in texts for command in commands(text)]


def write_files(page, folder):
    """The files that the page shows with their names."""
    for language, file, text in blocks(page):
        if file and language != "sh":
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")


def run(words, cli, folder):
    """Runs a command of ours; AssertionError unless it ends with 0."""
    match words:
        case ["python", "-m", module, *rest] if module.startswith("fluxbatch."):
            entry = module.removeprefix("fluxbatch.")
            ahead = ["aot=false"] if entry == "plan" and not any(word.startswith("aot=") for word in rest) else []
            code, said = cli(*rest, *ahead, entry=entry)
            assert code == 0, said
        case ["python", script, *rest, ">", target]:
            command = [sys.executable, ROOT / script, *rest]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
            assert done.returncode == 0 and done.stdout, done.stderr
            (folder / target).write_text(done.stdout)
        case _:
            pytest.fail(f"not a command that can be run here: {shlex.join(words)}")


def compose(words, cli):
    """Composes a command's configuration, of a sweep that of its first job."""
    match words:
        case ["python", "-m", module, *rest] if module.startswith("fluxbatch."):
            entry = module.removeprefix("fluxbatch.")
        case ["python", "jobs/launch/local.py", replicas, processes, *rest]:
            assert replicas.isdecimal() and processes.isdecimal()
            entry = "run"
        case _:
            pytest.fail(f"not a command that can be composed here: {shlex.join(words)}")
    if "-m" in rest:
        rest = [re.sub(r"^([\w.@/-]+=)([^\[{,]+),.*", r"\1\2", word) for word in rest if word != "-m"]
    code, said = cli("--cfg", "job", *rest, entry=entry)
    assert code == 0, said


# ---- examples


WITH_EXAMPLES = [
    pytest.param(page, marks=() if page == README else pytest.mark.slow, id=name(page))
    for page in PAGES
    if marked(page, "run", "compose")
]


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_the_examples_of_a_page_run(page, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for language, mark, text in blocks(page):
        for words in commands(text) if language == "sh" and mark in ("run", "compose") else ():
            run(words, cli, tmp_path) if mark == "run" else compose(words, cli)


def test_a_wrong_example_is_found(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong in ("python -m fluxbatch.run manifest=none.jsonl", "python -m fluxbatch.run -m prompt=x sed=1,2"):
        with pytest.raises(AssertionError):
            run(shlex.split(wrong), cli, tmp_path)
    for wrong in ("python -m fluxbatch.run model=flux-large prompt=x", "python -m fluxbatch.run num_step=3 prompt=x"):
        with pytest.raises(AssertionError):
            compose(shlex.split(wrong), cli)


@pytest.mark.parametrize("page", ALL, ids=name)
def test_every_shell_example_says_how_it_is_checked(page):
    shell = [block for block in blocks(page) if block[0] in ("sh", "bash", "shell", "console")]
    assert not [text for language, mark, text in shell if language != "sh" or mark not in MARKS]


@pytest.mark.parametrize("page", [page for page in ALL if marked(page, "shell")], ids=name)
def test_other_programs_are_given_what_is_there(page):
    targets = re.findall(r"^(\w+)(?: \w+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *words in marked(page, "shell"):
        assert program not in ("python", "sh") and (program != "make" or words[0] in targets), (program, *words)
        assert all((ROOT / word).exists() for word in words if word.startswith(("jobs/", "tests/", "fluxbatch/")))


@pytest.mark.parametrize("page", ALL, ids=name)
def test_data_in_examples_can_be_read(page):
    for language, _, text in blocks(page):
        if language in ("json", "jsonl"):
            [json.loads(line) for line in text.splitlines()]
        elif language == "yaml":
            yaml.safe_load(text)


# ---- links and form


def slug(heading):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ALL, ids=name)
def test_every_link_leads_somewhere(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_readme_links_to_every_page():
    linked = set(re.findall(r"\(jobs/docs/([\w-]+\.\w+)\)", README.read_text("utf-8")))
    assert linked == {path.name for path in DOCS.iterdir()}


def test_readme_is_short():
    assert len(README.read_text("utf-8").split()) < 700


def sentences(text):
    """The prose of a page: no code, no tables, no headings; an item of a list is a sentence."""
    lines = [line for line in BLOCK.sub("\n", text).splitlines() if not line.startswith(("|", "#", "<", "!", "---"))]
    prose = re.sub(r"^\s*(-|\d+\.) ", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", prose))
    return [sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?:]) ", part) if sentence]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "keys.md"] + COMMUNITY, ids=name)
def test_sentences_are_short(page):
    found = sentences(page.read_text("utf-8"))
    assert sum(len(sentence.split()) for sentence in found) <= 20 * len(found)


@pytest.mark.parametrize("page", [*PAGES, *COMMUNITY], ids=name)
def test_lines_have_120_columns_at_most(page):
    assert not [line for line in page.read_text("utf-8").splitlines() if len(line) > 120]


# ---- what is listed is what there is


def test_the_reference_of_keys_is_current():
    """Written by ``python -m fluxbatch.keys --markdown > jobs/docs/keys.md``."""
    assert (DOCS / "keys.md").read_text("utf-8") == "\n".join(reference.markdown()) + "\n"


def test_the_reference_has_every_key():
    text = (DOCS / "keys.md").read_text("utf-8")
    keys = {key for key in overrides.leaves(Job) if not key.startswith(("lora.", "sweep"))}
    assert keys and not {key for key in keys if f"- `{key}=" not in text}


def test_the_keys_command_prints_the_page(cli):
    code, said = cli("--markdown", entry="keys")
    assert code == 0 and said == (DOCS / "keys.md").read_text("utf-8")


def test_messages_of_troubleshooting_are_in_the_code():
    sources = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "fluxbatch").rglob("*.py")]
    constants = (node.value for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts = "\n".join(value for value in constants if isinstance(value, str))
    headings = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    parts = [part.strip() for heading in headings for part in heading.removeprefix("fluxbatch: ").split("…")]
    assert len(headings) > 50 and not [part for part in parts if part not in texts]


def test_the_architecture_lists_hydras_private_modules():
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "fluxbatch").rglob("*.py"))
    imports = re.findall(r"^from (hydra\._internal\.\w+) import (.+)$", sources, re.MULTILINE)
    used = {f"{module}.{name}" for module, names in imports for name in names.split(", ")}
    page = (DOCS / "architecture.md").read_text("utf-8")
    assert used and used == set(re.findall(r"^\| `(hydra\._internal[\w.]+)`", page, re.MULTILINE))


def test_the_architecture_names_every_package():
    layers = importlib.import_module("test_architecture").LAYERS
    packages = {package for layer in layers for package in layer} - {"__main__"}
    page = (DOCS / "architecture.md").read_text("utf-8")
    table = page.partition("## Packages")[2].partition("## Where")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert {word.strip("`/ ") for row in rows for word in row.split(",")} == packages
    picture = re.search(r"flowchart TD\n(.*?)```", table, re.DOTALL)[1]
    assert set(re.findall(r"\w+", picture)) - {"commands", "upper", "work", "middle", "lower"} == packages


def test_the_calls_between_processes_are_those_of_the_process_group():
    page = (DOCS / "architecture.md").read_text("utf-8")
    section = page.partition("## Processes")[2].partition("## ")[0]
    calls = re.findall(r"`(\w+)`", section)
    assert len(calls) > 10 and not [call for call in calls if not hasattr(ProcessGroup, call)]


def test_adding_a_model_names_everything_of_a_family():
    page = (DOCS / "adding-a-model.md").read_text("utf-8")
    parts = {part for part in {*vars(Family), *Family.__annotations__} if not part.startswith("_")} - {"configs"}
    named = {part for part in parts if f"`{part}`" in page or part.endswith(("_flops", "_bytes"))}
    assert len(parts) > 20 and named == parts


@pytest.mark.parametrize("page", [README, DOCS / "output.md"], ids=name)
def test_every_exit_code_has_its_line(page):
    rows = re.findall(r"^\| ([\d, ]+) \|", page.read_text("utf-8"), re.MULTILINE)
    assert {int(code) for row in rows for code in row.split(",")} >= {*map(int, Exit), 1, 134}
