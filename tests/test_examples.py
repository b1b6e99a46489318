"""Examples that people copy: doctests, the README's Python blocks, and the notebooks."""

import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import playbook_optax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(playbook_optax.__path__, "playbook_optax.")
    if not info.name.endswith("__main__")
)


# Each compiles several programs; what they show is tested in other ways too.
LONG_DOCTESTS = (
    "procedures.instability",
    "runner.preflight",
    "zoo.blocks",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith(LONG_DOCTESTS) else ())
        for name in MODULES
    ],
)
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_public_function_has_an_example_and_a_source():
    missing = []
    for name in playbook_optax.__all__:
        value = getattr(playbook_optax, name)
        if not inspect.isfunction(value):
            continue
        missing += [f"{name}: {part}" for part in ("Source:", ">>>") if part not in value.__doc__]
    assert not missing


# The later ones train further studies, of functions that have doctests.
@pytest.mark.parametrize("num_blocks", [5, pytest.param(len(BLOCKS), marks=pytest.mark.slow)])
def test_readme_blocks_run_in_order(tmp_path, num_blocks):
    assert len(BLOCKS) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCKS[:num_blocks]))
    out = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        check=False,
    )
    assert out.returncode == 0, out.stderr


# They train whole rounds of remedies, or tune twice, which alone takes minutes.
LONG_NOTEBOOKS = ("my_loss_explodes", "tune_your_own_model")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=pytest.mark.slow if path.stem in LONG_NOTEBOOKS else (), id=path.stem
        )
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ],
)
def test_notebooks_execute(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.cell_type == "code" for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
