"""The plan of the house, checked: who imports whom, registries that must agree, and what no module may do."""

from __future__ import annotations

import ast
import functools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff import request
from flagai_altdiff.convert import convert

PACKAGE = Path(request.__file__).parent
DOCS = PACKAGE.parent / "docs"
MODULES = sorted(PACKAGE.rglob("*.py"))
UNORDERED = 2
"""So many modules need no table of their own."""

Folder = tuple[str, ...]
"""Place of a folder in the package; () is the package itself."""


@functools.cache
def plan() -> dict[Folder, dict[str, int]]:
    """The tables of docs/architecture.md: folder -> name of a module or folder in it -> level.

    A folder's table comes after the line "`folder/`, from the bottom up:"; its levels are its rows' numbers, unless a
    column tells them.
    """
    found: dict[Folder, dict[str, int]] = {}
    levels: dict[str, int] | None = None
    told = False
    for line in (DOCS / "architecture.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if line.startswith("## "):
            levels = found.setdefault((), {}) if line == "## Rooms" else None
        elif heading := re.fullmatch(r"`([\w/]+)/`, from the bottom up:", line):
            levels = found.setdefault(tuple(heading[1].split("/")), {})
        elif cells and cells[0] == "module":
            told = cells[-1] == "level"
        elif levels is not None and (names := re.findall(r"`(\w+)(?:\.py|/)`", cells[0] if cells else "")):
            level = int(cells[-1]) if told else 1 + max(levels.values(), default=-1)
            assert not levels.keys() & set(names), f"{names} stand twice in docs/architecture.md"
            levels |= dict.fromkeys(names, level)
    return found


def place(path: Path) -> Folder:
    """A module's names from the package down: hub/client.py -> ("hub", "client")."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def room(path: Path) -> str:
    return "flagai_altdiff" if place(path) == ("__init__",) else place(path)[0]


def resolve(name: str) -> Folder:
    """The place of what an import names: the module that it is or lies in."""
    parts: list[str] = []
    for part in name.split(".")[1:]:
        here = PACKAGE.joinpath(*parts, part)
        if here.is_dir():
            parts.append(part)
        else:
            return (*parts, part) if here.with_suffix(".py").is_file() else (*parts, "__init__")
    return (*parts, "__init__")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports, with the line; ``from a import b`` counts as ``a.b``, relative or not."""
    package = ("flagai_altdiff", *place(path)[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def for_types_only(tree: ast.AST) -> set[int]:
    """Lines of imports that nothing runs."""
    return {
        line.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for line in ast.walk(node)
        if isinstance(line, (ast.Import, ast.ImportFrom))
    }


def level(folder: Folder, name: str) -> float:
    """Height of a module among its neighbours. The package's own names are lazy: they lie at the bottom."""
    if name == "__init__":
        return math.inf if folder else -1
    return plan().get(folder, {}).get(name, 0)


def upward(tree: ast.AST, path: Path) -> list[str]:
    """Imports of a module that do not go down."""
    skipped = for_types_only(tree) if place(path) == ("__init__",) else set()
    found = []
    for name, line in imports(tree, path):
        if name.split(".")[0] != "flagai_altdiff" or line in skipped:
            continue
        own, other = place(path), resolve(name)
        shared = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(own))
        folder = own[:shared]
        if shared == len(own) or level(folder, other[shared]) >= level(folder, own[shared]):
            found.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}, which is not below it")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    assert upward(parsed(path), path) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors.py", "from flagai_altdiff.registry import MODELS"),
        ("errors.py", "import flagai_altdiff.registry as known"),
        ("errors.py", "from flagai_altdiff import registry"),
        ("errors.py", "from .registry import MODELS"),
        ("errors.py", "from . import registry"),
        ("errors.py", "def later():\n    from .loading import load_model"),
        ("request.py", "from flagai_altdiff.predictor import Predictor"),
        ("hub/threads.py", "from .client import Client"),
        ("hub/threads.py", "from . import client"),
        ("hub/threads.py", "from flagai_altdiff.hub import fetch"),
        ("hub/threads.py", "from . import fetch"),
        ("hub/threads.py", "from ..loading import load_model"),
        ("hub/threads.py", "from .. import loading"),
        ("hub/baai.py", "from flagai_altdiff.hub.huggingface import list_files"),
        ("hub/baai.py", "from flagai_altdiff.hub import huggingface"),
        ("checkpoint/records.py", "from .layouts import detect"),
        ("mini/world.py", "from flagai_altdiff.mini.captions import caption"),
        ("mini/judge.py", "from .recipe.judge import judge_loss"),
        ("mini/recipe/steps.py", "from ..accuracy import measure\nfrom .parts import PARTS"),
        ("mini/recipe/steps.py", "from .tokenizer import build_tokenizer"),
    ],
)
def test_the_guard_sees_every_way_up(module: str, line: str) -> None:
    assert len(upward(ast.parse(line), PACKAGE / module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hub/__init__.py", "from .fetching import fetch\nfrom ..errors import HubError"),
        ("hub/fetching.py", "from . import client, threads\nfrom flagai_altdiff import __version__, errors"),
        (
            "mini/recipe/judge.py",
            "from ..judge import Judge\nfrom .steps import Task\nfrom ...errors import ConfigError",
        ),
        ("mini/recipe/parts.py", "from flagai_altdiff.mini.recipe import steps, stages"),
        ("cli/main.py", "import torch\nfrom flagai_altdiff.cli import tools\nfrom flagai_altdiff import hub"),
    ],
)
def test_the_guard_lets_the_ways_down_pass(module: str, line: str) -> None:
    assert upward(ast.parse(line), PACKAGE / module) == []


def test_the_plan_and_the_tree_agree() -> None:
    """Every module has its row, every row its module."""
    packages = {path.parent for path in MODULES if "_shim" not in place(path)}
    for package in packages:
        folder = package.relative_to(PACKAGE).parts
        there = {path.stem for path in package.glob("*.py") if path.stem != "__init__"}
        there |= {path.name for path in package.iterdir() if any(path.rglob("*.py"))}
        if folder in plan() or len(there) > UNORDERED:
            assert plan().get(folder, {}).keys() == there, f"the table of {'/'.join(folder) or 'the package'}"
    assert {PACKAGE.joinpath(*folder) for folder in plan()} <= packages


def test_the_docs_name_files_that_exist() -> None:
    files = [path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.parent.rglob("*.py")]
    for page in (*DOCS.glob("*.md"), PACKAGE.parent / "README.md"):
        for name in re.findall(r"`((?:[\w/]+/)?\w+\.py)`", page.read_text(encoding="utf-8")):
            assert any(file == name or file.endswith("/" + name) for file in files), f"{page.name} names {name}"


ONLY: dict[str, set[str]] = {
    **{light: set() for light in ("flagai_altdiff", "errors", "files", "registry", "model_files")},
    "options": {"pydantic", "pydantic_core"},
    "request": {"pydantic"},
    "sampling": {"torch"},
    "models": {"torch", "einops"},
    "hub": {"filelock", "requests", "urllib3", "tqdm"},
}
"""Room -> the only packages that it may import, beside Python's own."""

ALONE = {"pytorch_lightning": {"training", "batch"}}
"""Package -> the only rooms that may import it."""


def packages(path: Path) -> Iterator[tuple[str, int]]:
    """The third-party packages that a module imports when it runs."""
    tree = parsed(path)
    skipped = for_types_only(tree)
    for name, line in imports(tree, path):
        package = name.split(".")[0]
        if line not in skipped and package not in sys.stdlib_module_names | {"flagai_altdiff"}:
            yield package, line


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_light_rooms_stay_light(path: Path) -> None:
    own = room(path)
    for package, line in packages(path):
        assert package in ONLY.get(own, {package}), f"{path}:{line} imports {package}"
        assert own in ALONE.get(package, {own}), f"{path}:{line} imports {package}"


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub.load",
    "instantiate_from_config",
}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nothing_is_executed_that_came_from_outside(path: Path) -> None:
    for name, line in calls(parsed(path)):
        assert name not in FORBIDDEN, f"{path}:{line} calls {name}"
        if name.endswith("import_module"):
            assert path == PACKAGE / "__init__.py", f"{path}:{line} imports by string"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_command_line_prints(path: Path) -> None:
    if room(path) not in ("cli", "__main__"):
        assert [line for name, line in calls(parsed(path)) if name in ("print", "input", "logging.basicConfig")] == []


def test_the_shim_only_renames() -> None:
    for path in (PACKAGE / "_shim").rglob("*.py"):
        for node in parsed(path).body:
            assert isinstance(node, (ast.ImportFrom, ast.Expr)) or ast.unparse(node).startswith("__all__"), path


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        tree = parsed(path)
        assert not tree.body or ast.get_docstring(tree), path


TRAINER = {"pytorch_lightning", "lightning_fabric", "torchmetrics", "torch._dynamo", "torch._inductor"}
OTHERS_MODELS = {"transformers", "huggingface_hub", "tokenizers", "diffusers"}
YAML = {"omegaconf", "antlr4", "yaml"}
TORCH = {"torch", "numpy", "PIL", "safetensors"}
LOADED = """
import sys
def none_of(*names):
    loaded = {name for name in names if name in sys.modules}
    assert not loaded, sorted(loaded)
"""
LIGHT = """
import flagai_altdiff, flagai_altdiff.registry, flagai_altdiff.request, flagai_altdiff.errors, flagai_altdiff.hub
import flagai_altdiff.cli
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.world import all_scenes
assert flagai_altdiff.__version__ and caption(all_scenes()[0], "en")
flagai_altdiff.GenerationRequest(prompts=("a",)), flagai_altdiff.MODELS
none_of(*HEAVY)
import flagai_altdiff.mini.drawing
none_of("torch")
try:
    flagai_altdiff.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
IMPORT = """
from flagai_altdiff import AutoLoader, Predictor
none_of(*HEAVY)
"""
DRAW = """
import sys
from flagai_altdiff import generate, load_model
assert generate(load_model(sys.argv[1], safety_checker=False), "a star", steps=1, height=64, width=64).images
none_of(*HEAVY)
"""


def run(script: str, heavy: set[str], folder: Path, environment: dict[str, str], *arguments: Path) -> None:
    """Run a script in a process of its own, which must load none of the heavy modules, and write nothing."""
    command = [sys.executable, "-c", f"{LOADED}\nHEAVY = {sorted(heavy)}\n{script}", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []


def test_importing_the_package_loads_no_torch(tmp_path: Path, script_environment: dict[str, str]) -> None:
    run(LIGHT, TRAINER | OTHERS_MODELS | YAML | TORCH, tmp_path, script_environment)


def test_importing_the_doors_loads_no_trainer(tmp_path: Path, script_environment: dict[str, str]) -> None:
    run(IMPORT, TRAINER | OTHERS_MODELS | YAML, tmp_path, script_environment)


def test_drawing_loads_no_trainer(tmp_path: Path, m9_folder: Path, script_environment: dict[str, str]) -> None:
    run(DRAW, TRAINER | OTHERS_MODELS, tmp_path, script_environment, m9_folder)


def test_yaml_is_loaded_for_a_yaml_only(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, m9_folder: Path, script_environment: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("without yaml") / "model"
    convert(m9_folder, folder, "diffusers")
    run(DRAW, YAML, tmp_path, script_environment, folder)


def test_every_public_name_is_there() -> None:
    import flagai_altdiff

    for name in flagai_altdiff.__all__:
        assert getattr(flagai_altdiff, name) is not None
    assert set(flagai_altdiff.__all__) == set(flagai_altdiff._HOMES)
