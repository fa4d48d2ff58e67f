"""What the project promises about itself: short files, light imports, imports that point one way, a wheel that runs.

The import rule is that of docs/STRUCTURE.md, read from the source with `ast`, so that an import inside a function
counts too.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_ROOTS = {
    "bitdistill_ray": ROOT / "bitdistill_ray",
    "bitdistill_kernels": ROOT / "kernels" / "bitdistill_kernels",
    "bitdistill_serve": ROOT / "serve" / "bitdistill_serve",
}
LONGEST_FILE = 400
LONGEST_DRIVER = 120

# A part may import its own layer and those before it.  A module that is not named is an entry module, after all others.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "env", "board", "sigterm"}),
    frozenset({"core"}),
    frozenset({"section", "shipped"}),
    frozenset({"config", "stage_config", "loss_config", "task_config", "evaluate_config", "monitor_config"}),
    frozenset({"quant", "losses", "storage", "storage_retry", "hardware", "machine", "ray_errors", "recipe"}),
    frozenset({"model", "packed", "runs", "shape"}),
    frozenset({"decode", "teacher", "data", "tracking"}),
    frozenset({"cache"}),
    frozenset({"student", "evaluation", "plan"}),
    frozenset({"report"}),
    frozenset({"stages"}),
)
# What computes or stores knows tensors, specs and bytes, never the configuration of a run.
FREE_OF_CONFIG = frozenset({"core", "quant", "losses", "packed", "storage", "storage_retry", "model", "decode"})
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ENTRY = len(LAYERS)


def _sources(*suffixes: str) -> list[Path]:
    skipped = {".git", ".venv", ".cache", "build", "dist", "runs", "__pycache__"}
    return [
        path
        for folder in ("bitdistill_ray", "kernels", "serve", "cluster", "tests", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and not skipped & set(path.relative_to(ROOT).parts)
    ]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, wherever it stands, except those that only the type checker sees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from package import part` imports the part.
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _layer(part: str) -> int:
    return LEVEL.get(part, ENTRY)


def test_no_file_is_too_long() -> None:
    sources = _sources(".py", ".cpp", ".cu", ".h", ".inl", ".yaml", ".json", ".md")
    assert len(sources) > 20
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in sources}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_the_driver_reads_like_a_paragraph() -> None:
    driver = ROOT / "bitdistill_ray" / "train.py"
    if not driver.exists():
        pytest.skip("train.py is not written yet")
    assert len(driver.read_text(encoding="utf-8").splitlines()) <= LONGEST_DRIVER


def test_imports_of_the_library_point_one_way() -> None:
    root = PACKAGE_ROOTS["bitdistill_ray"]
    wrong = []
    for path in root.rglob("*.py"):
        own = path.relative_to(root).with_suffix("").parts[0]
        for line, module in _imports(path):
            parts = module.split(".")
            if parts[0] != "bitdistill_ray" or len(parts) < 2 or not _is_part(parts[1]):
                continue
            if _layer(parts[1]) > _layer(own) or (own in FREE_OF_CONFIG and parts[1] in ("config", "recipe", "runs")):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {parts[1]}")
    assert sorted(set(wrong)) == []


def _is_part(name: str) -> bool:
    root = PACKAGE_ROOTS["bitdistill_ray"]
    return (root / name).is_dir() or (root / f"{name}.py").is_file()


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("bitdistill_kernels", {"", "errors"}),  # packed bytes, and nothing of the library
        ("bitdistill_serve", {"", "errors", "env", "core", "hardware", "packed", "storage", "decode", "model"}),
    ],
)
def test_kernels_and_serving_know_nothing_of_training(package: str, allowed: set[str]) -> None:
    wrong = []
    for path in PACKAGE_ROOTS[package].rglob("*.py"):
        for line, module in _imports(path):
            parts = module.split(".")
            part = parts[1] if len(parts) > 1 else ""
            if parts[0] == "bitdistill_ray" and part not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {module}")
            if parts[0] == "bitdistill_serve" and package == "bitdistill_kernels":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: imports {module}")
    assert wrong == []


def test_only_env_reads_the_environment() -> None:
    reads = re.compile(r"\bos\.(environ|getenv|environb)\b|from os import .*\b(environ|getenv)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for root in PACKAGE_ROOTS.values()
        for path in root.rglob("*.py")
        if path != ROOT / "bitdistill_ray" / "env.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if reads.search(line)
    ]
    assert found == []


MODEL_LIBRARIES = ("torch", "deepspeed", "transformers")
HELP_AND_REFUSALS = ("core", "errors", "env", "config", "recipe")
ACTORS = ("teacher.registry", "student.entry", "student.monitor", "data.feeder", "board")


@pytest.mark.parametrize(
    ("modules", "libraries"), [(HELP_AND_REFUSALS, (*MODEL_LIBRARIES, "ray")), (ACTORS, MODEL_LIBRARIES)]
)
def test_what_must_be_there_at_once_imports_nothing_heavy(modules: Sequence[str], libraries: Sequence[str]) -> None:
    """`--plan`, `--help`, a mistake in a recipe; and the actors that come before a model's own processes."""
    program = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(f'bitdistill_ray.{module}')\n"
        f"    if heavy := {set(libraries)} & set(sys.modules):\n"
        "        sys.exit(f'{module} imports {sorted(heavy)}')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_requirement_is_bounded_below_and_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in requirements:
        assert "==" not in requirement.partition(";")[0], f"{requirement}: pyproject.toml bounds, constraints.txt pins"
        name = re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"{requirement} has no tested version"
    assert all(re.fullmatch(r"[\w.!+-]+", version) for version in pins.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    """Built as a user builds it, installed beside the dependencies and nothing of this checkout, it prints its help."""
    wheels, environment, elsewhere = tmp_path / "wheels", tmp_path / "env", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    [wheel] = wheels.glob("*.whl")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    [site] = environment.glob("lib/python*/site-packages")
    # A plain path line: the folder's packages, but not the .pth file of an editable install there.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n", encoding="utf-8")

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = f"import {', '.join(PACKAGE_ROOTS)}\nfor package in {', '.join(PACKAGE_ROOTS)}: print(package.__file__)"
    files = subprocess.run(
        [python, "-c", where], cwd=elsewhere, env=clean, check=True, capture_output=True, text=True
    ).stdout.split()
    assert all(Path(file).is_relative_to(site) for file in files), files
    command = [python, "-m", "bitdistill_ray.train", "--help"]
    helped = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, check=False)
    assert helped.returncode == 0, helped.stderr
    assert "RECIPE" in helped.stdout
