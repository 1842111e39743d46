"""The house keeps its order: imports go down, rooms stay small, no machine's paths are left lying about."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fluxbatch").rglob("*.py"))
}

WORDS = {"fluxbatch", "fluxbatch.types", "fluxbatch.config"}
ART = {"fluxbatch.text", "fluxbatch.sampling", "fluxbatch.programs", "fluxbatch.pipeline", "fluxbatch.writer"}
SERVICES = {"fluxbatch.io", "fluxbatch.dist", "fluxbatch.batching", "fluxbatch.tokens"}
# Room → the rooms below it that it may import, besides its own. Whatever is not here is the roof.
MAY = {
    **{word: WORDS for word in WORDS},
    **{service: WORDS for service in SERVICES},
    "fluxbatch.models": {"fluxbatch.dist.mesh"},  # the axis rules; no path, no configuration, no host
    "fluxbatch.weights": WORDS | {"fluxbatch.io", "fluxbatch.dist", "fluxbatch.models"},
    **{art: WORDS | SERVICES | ART | {"fluxbatch.models", "fluxbatch.weights"} for art in ART},
}


def within(module, room):
    return module == room or (room != "fluxbatch" and module.startswith(room + "."))


def imports(source, module, is_package=False):
    """Every module named by an import statement anywhere in ``source``, by its full name."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def is_allowed(module, target):
    room = next((room for room in MAY if within(module, room)), None)
    if room is None or target.partition(".")[0] != "fluxbatch":
        return True
    return within(target, room) or any(within(target, other) for other in MAY[room])


@pytest.fixture(scope="module")
def graph():
    """Module → all that it imports."""
    return {
        module: set(imports(path.read_text("utf-8"), module, path.name == "__init__.py"))
        for module, path in MODULES.items()
    }


def test_imports_go_down_only(graph):
    wrong = [f"{module} imports {t}" for module, targets in graph.items() for t in targets if not is_allowed(module, t)]
    assert not wrong


def test_imports_have_no_cycle(graph):
    # storage opens its GCS side when first asked for a bucket, which builds on storage's own words
    late = {("fluxbatch.io.storage", "fluxbatch.io.gcs")}
    inside = {
        module: {t for t in targets if t in MODULES and t != "fluxbatch" and (module, t) not in late}
        for module, targets in graph.items()
    }
    tuple(graphlib.TopologicalSorter(inside).static_order())


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("fluxbatch.types", "import fluxbatch.io.storage", False),
        ("fluxbatch.config", "from fluxbatch import types", True),
        ("fluxbatch.io.ledger", "from fluxbatch import batching", False),
        ("fluxbatch.io.ledger", "from .storage import Store", True),
        ("fluxbatch.io.ledger", "from ..weights import load", False),
        ("fluxbatch.dist.mesh", "from fluxbatch.io.storage import Store", False),
        ("fluxbatch.models.flux", "from fluxbatch.dist.mesh import make_mesh", True),
        ("fluxbatch.models.flux", "from fluxbatch.dist import hosts", False),
        ("fluxbatch.models.flux", "from fluxbatch.config import Job", False),
        ("fluxbatch.weights.load", "def f():\n  from fluxbatch import pipeline", False),
        ("fluxbatch.weights.load", "from fluxbatch.models import flux", True),
        ("fluxbatch.pipeline", "from fluxbatch import sampling, __version__", True),
        ("fluxbatch.pipeline", "import fluxbatch.run", False),
        ("fluxbatch.run", "import fluxbatch.pipeline, fluxbatch.finish", True),
        ("fluxbatch.io.gallery", "import fluxbatched", True),
    ],
)
def test_the_rule_itself(module, source, allowed):
    assert all(is_allowed(module, target) for target in imports(source, module)) == allowed


def test_torch_is_never_imported_nor_what_only_tests_and_training_have(graph):
    strangers = {"torch", "diffusers", "peft", "accelerate", "optax", "pytest", "hypothesis"}
    assert not [(module, t) for module, targets in graph.items() for t in targets if t.partition(".")[0] in strangers]


def test_io_and_the_words_import_no_jax_directly_or_through_others():
    quick = {"fluxbatch.types", "fluxbatch.config", "fluxbatch.cli", "fluxbatch.batching"}
    names = [module for module in MODULES if module in quick or within(module, "fluxbatch.io")]
    assert len(names) > len(quick) + 3
    script = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n    assert 'jax' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_rooms_stay_small():
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: lines for module, lines in lengths.items() if lines > 350}


# Tests may use made-up paths as a user's input; nothing else may name a place of one machine.
ANYWHERE = re.compile(r"(?<![\w.~/-])/(?:root|work)(?![\w-])|\.\./shared(?![\w-])")
OUTSIDE_TESTS = re.compile(r"(?<![\w.~/-])/(?:tmp|home)(?![\w-])")


def places(name, text):
    patterns = [ANYWHERE] if name.startswith("tests/") else [ANYWHERE, OUTSIDE_TESTS]
    return [match[0] for pattern in patterns for match in pattern.finditer(text)]


def test_no_file_names_a_place_of_one_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {}
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" not in data[:8192]:  # text
            found[name] = places(name, data.decode("utf-8", "replace"))
    assert len(found) > 20
    assert not {name: matches for name, matches in found.items() if matches and name != "tests/test_house.py"}


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.py", "x = '/root/models'", 1), ("tests/a.py", "/work/main", 1), ("README.md", "cd /tmp", 1),
        ("tests/a.py", "{i: /tmp/x}", 0), ("a.yaml", "output_dir: /home/me/out", 1), ("a.md", "see ../shared/x", 1),
        ("a.py", "https://example.org/home/x and some/work/dir and /workspace and ~/tmp", 0),
    ],
)  # fmt: skip
def test_the_search_itself(name, text, count):
    assert len(places(name, text)) == count
