"""The walls between the packages: who may import whom, and what an import brings along.

import-linter reads the source; the subprocesses below import it for real, with what is forbidden made to fail.
"""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("altgrad_core", "altgrad_jax", "altgrad_torch", "altgrad")
JAX_SIDE = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")


class Wall(NamedTuple):
    """A package, what its import must not touch, and what must be installed to import all of it."""

    package: str
    blocked: tuple[str, ...]
    needs: tuple[str, ...]


WALLS = (
    Wall("altgrad_core", (*JAX_SIDE, "torch", "scipy", "altgrad_jax", "altgrad_torch", "altgrad"), needs=()),
    Wall("altgrad_jax", ("torch", "altgrad_torch", "altgrad"), needs=("jax", "optax", "flax", "orbax")),
    Wall("altgrad_torch", (*JAX_SIDE, "altgrad_jax", "altgrad"), needs=("torch",)),
)

# Imports a package and all its modules while a finder ahead of all others refuses the blocked names.
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

package, *blocked = sys.argv[1:]

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is behind the wall of {package}", name=name)

sys.meta_path.insert(0, Wall())

def fail(name):
    raise  # walk_packages would swallow an ImportError

root = importlib.import_module(package)
for module in pkgutil.walk_packages(root.__path__, package + ".", onerror=fail):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
        print(module.name)
assert not set(blocked) & set(sys.modules), set(blocked) & set(sys.modules)
"""


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the packages of this checkout."""
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def module_names(package: str) -> set[str]:
    """The dotted names of a package's modules, from its files."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in files}
    return {name for name in names if not name.endswith(".__main__")} - {package}


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: wall.package)
def test_imports_without_what_is_forbidden(wall: Wall) -> None:
    missing = [name for name in wall.needs if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = run_python(IMPORT_EVERYTHING, wall.package, *wall.blocked)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == module_names(wall.package)


def test_the_wall_holds() -> None:
    """What a forbidden import looks like, lest the test above passes because nothing is ever refused."""
    done = run_python(IMPORT_EVERYTHING, "email", "quopri")
    assert done.returncode != 0
    assert "quopri is behind the wall of email" in done.stderr


def test_core_is_light() -> None:
    done = run_python("import sys, altgrad_core; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "altgrad_core" in loaded
    assert not loaded & {*JAX_SIDE, "torch", "scipy"}


def test_import_linter() -> None:
    pytest.importorskip("importlinter")
    done = run_python("from importlinter.cli import lint_imports_command as main; main()", "--no-logo", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_console_script() -> None:
    try:
        distribution = metadata.distribution("altgrad")
    except metadata.PackageNotFoundError:
        pytest.skip("altgrad is not installed, only checked out")
    scripts = {script.name: script.value for script in distribution.entry_points.select(group="console_scripts")}
    assert scripts == {"altgrad": "altgrad.cli:main"}
