"""The plan of the house, checked: who imports whom, registries that must agree, and what no module may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff import metadata, registry, request
from flagai_altdiff.sampling import SAMPLERS

PACKAGE = Path(request.__file__).parent
LEVELS = {
    **dict.fromkeys(("flagai_altdiff", "errors", "files"), 0),
    **dict.fromkeys(("request", "registry", "config"), 1),
    **dict.fromkeys(("sampling", "hub", "images", "tokenizer", "checkpoint", "scenes", "memory"), 2),
    **dict.fromkeys(("models", "safety"), 3),
    **dict.fromkeys(("loading", "pipeline"), 4),
    **dict.fromkeys(("metadata", "auto_loader"), 5),
    **dict.fromkeys(("runs", "convert", "doctor", "evaluation"), 6),
    **dict.fromkeys(("predictor", "training"), 7),
    **dict.fromkeys(("web", "_shim"), 8),
    "cli": 9,
    "__main__": 10,
}
"""Room -> level; a module imports from lower levels, and from its own room."""

BESIDE = {("checkpoint", "tokenizer")}
"""Neighbours of one level that may meet: importer, imported."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "flagai_altdiff" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports, with the line; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def type_checking_lines(tree: ast.AST) -> set[int]:
    return {
        line.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for line in ast.walk(node)
        if isinstance(line, (ast.Import, ast.ImportFrom))
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    tree = parsed(path)
    own = room(path)
    assert own in LEVELS, f"{own} is not in the plan: give it a level"
    skip = type_checking_lines(tree) if own == "flagai_altdiff" else set()
    for name, line in imports(tree):
        parts = name.split(".")
        if parts[0] != "flagai_altdiff" or line in skip:
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in LEVELS else "flagai_altdiff"
        fine = other == own or LEVELS[other] < LEVELS[own] or (own, other) in BESIDE
        assert fine, f"{path.name}:{line} ({own}, level {LEVELS[own]}) imports {name} (level {LEVELS[other]})"


def uses(rooms: set[str], *packages: str) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in MODULES
        if room(path) in rooms
        for name, line in imports(parsed(path))
        if name.split(".")[0] in packages
    ]


def test_light_rooms_stay_light() -> None:
    assert uses({"flagai_altdiff", "errors", "request", "registry", "config", "hub"}, "torch", "transformers", "PIL") == []
    assert uses({"sampling"}, "transformers", "pytorch_lightning", "PIL", "tqdm", "omegaconf") == []
    for name in ("unet", "attention", "autoencoder", "text_encoder"):
        tree = parsed(PACKAGE / "models" / f"{name}.py")
        assert not {n.split(".")[0] for n, _ in imports(tree)} & {"transformers", "pytorch_lightning", "omegaconf"}


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


def test_registries_agree() -> None:
    assert tuple(SAMPLERS) == request.SAMPLER_NAMES
    assert set(metadata._SAMPLER_TITLES) == set(SAMPLERS)
    assert registry.TASKS == ("text2img",)


def test_the_shim_only_renames() -> None:
    for path in (PACKAGE / "_shim").rglob("*.py"):
        for node in parsed(path).body:
            assert isinstance(node, (ast.ImportFrom, ast.Expr)) or ast.unparse(node).startswith("__all__"), path


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        tree = parsed(path)
        assert not tree.body or ast.get_docstring(tree), path


LIGHT = """
import sys
import flagai_altdiff, flagai_altdiff.registry, flagai_altdiff.request, flagai_altdiff.errors, flagai_altdiff.hub
assert flagai_altdiff.__version__
flagai_altdiff.GenerationRequest(prompts=("a",)), flagai_altdiff.MODELS
heavy = {"torch", "transformers", "pytorch_lightning", "PIL", "numpy"} & set(sys.modules)
assert not heavy, heavy
try:
    flagai_altdiff.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("no AttributeError")
"""


def test_importing_the_package_loads_no_torch(tmp_path: Path, script_environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, cwd=tmp_path, env=script_environment, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there() -> None:
    import flagai_altdiff

    for name in flagai_altdiff.__all__:
        assert getattr(flagai_altdiff, name) is not None
    assert set(flagai_altdiff.__all__) == set(flagai_altdiff._HOMES)
