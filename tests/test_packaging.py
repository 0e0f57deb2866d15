"""The house rules that a program can check: who imports whom, how long a file is, what the wheel ships."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("moe_jax", "interop", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
)
LIBRARY = sorted((ROOT / "moe_jax").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function: `from a.b import c` gives a.b and a.b.c."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def importers(*prefixes: str) -> list[str]:
    """Files of the library that import one of the modules or something below it."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, prefixes))})(\.|$)")
    return [path.relative_to(ROOT).as_posix() for path in LIBRARY if any(map(pattern.match, imported_modules(path)))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_outgrows_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_init_files_only_re_export(path):
    assert len(path.read_text().splitlines()) < 60
    docstring, *statements = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        is_dunder = isinstance(statement, ast.Assign) and all(
            isinstance(target, ast.Name) and re.fullmatch("__[a-z]+__", target.id) for target in statement.targets
        )
        assert is_dunder or isinstance(statement, ast.Import | ast.ImportFrom), ast.unparse(statement)


COMPAT = {"moe_jax/_compat.py", "moe_jax/_compat_routing.py", "moe_jax/_compat_words.py"}


def test_only_kernels_and_compat_import_pallas():
    files = importers("jax.experimental.pallas", "jax.experimental.mosaic")
    assert files, "the search finds nothing at all"
    assert [file for file in files if not file.startswith("moe_jax/kernels/") and file not in COMPAT] == []


def test_only_compat_imports_private_jax():
    assert set(importers("jax._src", "jaxlib")) <= COMPAT


def test_only_what_compares_with_torch_imports_it():
    assert importers("torch", "transformers") == ["moe_jax/bench/peers.py", "moe_jax/demo/transformers_side.py"]


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("kernels", ["ops", "routing", "moe", "checkpoints", "reference", "demo", "bench", "cli"]),
        ("ops", ["routing", "moe", "checkpoints", "reference", "demo", "bench", "cli"]),
        ("reference.py", ["ops", "kernels", "activations", "moe", "routing", "bench"]),
        ("routing.py", ["kernels", "moe", "checkpoints", "demo", "bench", "cli"]),
        ("moe.py", ["kernels", "checkpoints", "demo", "bench", "cli"]),
        ("checkpoints", ["kernels", "ops", "demo", "bench", "cli"]),
        ("parallel", ["layer_test", "checkpoints", "demo", "bench", "cli"]),
        ("layer_test", ["kernels", "ops", "checkpoints", "demo", "bench", "cli"]),
        ("losses.py", ["kernels", "ops", "routing", "moe", "parallel", "nn", "demo", "bench", "cli"]),
        ("router_training.py", ["kernels", "ops", "routing", "moe", "parallel", "nn", "demo", "bench", "cli"]),
        ("nn", ["kernels", "ops", "checkpoints", "demo", "bench", "cli"]),
        ("demo", ["bench", "cli"]),
        ("bench", ["kernels", "ops", "checkpoints", "demo", "cli"]),
    ],
)
def test_nothing_points_back(room, never):
    modules = [f"moe_jax.{name}" for name in never]
    assert [file for file in importers(*modules) if file.startswith(f"moe_jax/{room}")] == []


def test_only_the_flax_layers_import_flax():
    files = importers("flax")
    assert files and all(file.startswith("moe_jax/nn/") for file in files)


def test_importing_the_package_and_its_command_line_loads_no_torch():
    heavy = ("torch", "transformers", "matplotlib", "tokamax", "flax")
    code = f"import sys, moe_jax, moe_jax.cli, moe_jax.bench.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_wheel_ships_both_packages_and_the_script(tmp_path):
    builder = pytest.importorskip("hatchling.builders.wheel")
    wheel = next(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    python_files = {path.relative_to(ROOT).as_posix() for path in LIBRARY}
    python_files |= {path.relative_to(ROOT / "interop").as_posix() for path in (ROOT / "interop").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python_files
    assert "moe_jax_torch/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "moe-jax = moe_jax.cli:main" in entry_points


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert importlib.metadata.version("moe_jax") == version == newest


def test_readme_names_only_what_exists():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([\w-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", readme)
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []


def test_readme_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
