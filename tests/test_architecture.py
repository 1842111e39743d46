"""The architecture: imports go down, modules stay small, no machine's paths are left lying about."""

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

# Packages from the lowest to the highest: each may import those in the lines before its own, and nothing else.
LAYERS = (
    ("types",),
    ("config", "storage", "distributed"),
    ("models", "manifest", "results"),
    ("weights",),
    ("lora",),
    ("generation", "shards"),
    ("reporting",),
    ("planning", "session"),
    ("convert", "keys", "plan", "replay", "run", "status", "verify"),
    ("__main__",),
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
# What a layer above may not reach all the same: models know devices and no configuration.
NEVER = {("models", "config")}


def package_of(module):
    """The package or command of a module of ours; None for the version in ``fluxbatch`` itself."""
    return module.split(".")[1] if "." in module else None


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
    if target.partition(".")[0] != "fluxbatch":
        return True
    here, there = package_of(module), package_of(target)
    return there is None or here == there or (LEVEL[there] < LEVEL[here] and (here, there) not in NEVER)


@pytest.fixture(scope="module")
def graph():
    """Module → all that it imports."""
    return {
        module: set(imports(path.read_text("utf-8"), module, path.name == "__init__.py"))
        for module, path in MODULES.items()
    }


def test_every_package_has_its_layer_and_a_line_about_its_duty():
    packages = {package_of(module) for module in MODULES} - {None}
    assert packages == set(LEVEL)
    folders = {path.parent for path in MODULES.values()} - {ROOT / "fluxbatch"}
    for folder in folders:
        duty = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
        assert duty and "\n" not in duty, folder


def test_the_top_is_small():
    top = [
        path.stem for path in MODULES.values() if path.parent == ROOT / "fluxbatch" and not path.stem.startswith("__")
    ]
    assert len(top) <= 8, top


def test_imports_go_down_only(graph):
    wrong = [f"{module} imports {t}" for module, targets in graph.items() for t in targets if not is_allowed(module, t)]
    assert not wrong


def test_imports_have_no_cycle(graph):
    inside = {module: {t for t in targets if t in MODULES and t != "fluxbatch"} for module, targets in graph.items()}
    tuple(graphlib.TopologicalSorter(inside).static_order())


def test_the_packages_are_few_and_so_are_their_arrows(graph):
    arrows = {
        (package_of(module), package_of(t))
        for module, targets in graph.items()
        for t in targets
        if t.startswith("fluxbatch.") and package_of(module) and package_of(module) != package_of(t)
    }
    arrows = {arrow for arrow in arrows if "__main__" not in arrow}  # a second name of run
    assert len(LEVEL) - 1 <= 21 and len(arrows) <= 90, len(arrows)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("fluxbatch.types", "import fluxbatch.storage.base", False),
        ("fluxbatch.config.schema", "from fluxbatch import types", True),
        ("fluxbatch.results.ledger", "from fluxbatch.shards import batching", False),
        ("fluxbatch.results.ledger", "from .resume import match", True),
        ("fluxbatch.results.ledger", "from ..weights import load", False),
        ("fluxbatch.distributed.mesh", "from fluxbatch.storage.base import Store", False),
        ("fluxbatch.models.flux1.clip", "from fluxbatch.distributed.mesh import make_mesh", True),
        ("fluxbatch.models.layers", "from fluxbatch.config.schema import Job", False),
        ("fluxbatch.weights.load", "def f():\n  from fluxbatch.generation import pipeline", False),
        ("fluxbatch.weights.load", "from fluxbatch.models import family", True),
        ("fluxbatch.generation.pipeline", "from fluxbatch import __version__", True),
        ("fluxbatch.generation.pipeline", "import fluxbatch.run", False),
        ("fluxbatch.run", "import fluxbatch.generation.pipeline, fluxbatch.session.finalize", True),
        ("fluxbatch.results.gallery", "import fluxbatched", True),
    ],
)
def test_the_rule_itself(module, source, allowed):
    assert all(is_allowed(module, target) for target in imports(source, module)) == allowed


# A family's own words. Names that the user knows stay in config/, where they are keys.
FAMILY_WORDS = re.compile(
    r"\b(?:t5|T5|t5xxl\w*|clip_(?!to)\w+|CLIP|[Ff]lux\.?[123]\w*|FLUX\.[123]|FluxPipeline|double_blocks|single_blocks|text_encoder(?:_2)?|tokenizer_2"
    r"|Qwen\w*|qwen\w*)\b")  # fmt: skip


def test_only_models_know_a_family():
    """What is FLUX.1's or another's lies in its folder: no other module names a family or a component."""
    found = {}
    for module, path in MODULES.items():
        if package_of(module) in ("models", "config"):
            continue
        lines = path.read_text("utf-8").splitlines()
        if hits := [
            f"{number}: {match[0]}" for number, line in enumerate(lines, 1) for match in FAMILY_WORDS.finditer(line)
        ]:
            found[module] = hits
    assert not found


def test_torch_is_never_imported_nor_what_only_tests_and_training_have(graph):
    strangers = {"torch", "diffusers", "peft", "accelerate", "optax", "pytest", "hypothesis"}
    assert not [(module, t) for module, targets in graph.items() for t in targets if t.partition(".")[0] in strangers]


def test_what_runs_before_jax_starts_does_not_import_it():
    quick = ("types", "config", "storage", "manifest", "results")
    names = [module for module in MODULES if package_of(module) in quick] + ["fluxbatch.shards.batching"]
    script = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n    assert 'jax' not in "
        "sys.modules, name"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# What may be imported inside a function, and why: no run needs all of it, and --help needs none.
LATE = {
    "fluxbatch": "JAX comes with it: a command's own work, imported once the command line is checked",
    "jax.experimental.pallas": "half a second, on TPUs only",
    "transformers": "half a second, where there is text to encode",
    "huggingface_hub": "only where the checkpoint is a name of the hub",
    "pyarrow": "optional",
    "webdataset": "optional",
}
COMMANDS = ("convert", "plan", "replay", "run")


def late_imports(source, module):
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for name in imports(ast.unparse(function), module)}


def is_late(module, name):
    reason = next((late for late in LATE if name == late or name.startswith(f"{late}.")), None)
    return reason is not None and (reason != "fluxbatch" or package_of(module) in COMMANDS)


def test_imports_inside_functions_have_a_reason():
    found = {module: late_imports(path.read_text("utf-8"), module) for module, path in MODULES.items()}
    assert not [(module, name) for module, names in found.items() for name in names if not is_late(module, name)]
    used = {late for names in found.values() for name in names for late in LATE if name.startswith(late)}
    assert used == set(LATE)


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("fluxbatch.run", "fluxbatch.session.session", True),
        ("fluxbatch.weights.load", "fluxbatch.models.family", False),
        ("fluxbatch.manifest.files", "pyarrow.parquet", True),
        ("fluxbatch.results.ledger", "json", False),
    ],
)
def test_the_rule_of_late_imports_itself(module, name, allowed):
    assert late_imports(f"def f():\n    import {name}", module) == {name} and is_late(module, name) == allowed


def test_modules_stay_small():
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: lines for module, lines in lengths.items() if lines > 400}


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
    assert not {name: matches for name, matches in found.items() if matches and name != "tests/test_architecture.py"}


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
