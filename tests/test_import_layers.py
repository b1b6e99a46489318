"""The house: imports point only downward, and importing costs no array, backend or extra."""

import ast
import pathlib
import subprocess
import sys

import pytest

import playbook_optax

PACKAGE = pathlib.Path(playbook_optax.__file__).parent

# The floor of each module or folder directly below the package.
FLOORS = {
    "_checks": 0,
    "_direction": 0,
    "_feasibility": 0,
    "_histogram": 0,
    "_portable": 0,
    "_shown": 0,
    "_text": 0,
    "_ties": 0,
    "_tree": 0,
    "optimizers": 1,
    "schedules": 1,
    "learning_rate": 1,
    "norms": 1,
    "search_space": 1,
    "search_spaces": 1,
    "samplers": 1,
    "reducers": 1,
    "trials": 2,
    "zoo": 2.5,  # beside the floors above trials, and never above trials itself
    "records": 3,
    "analysis": 4,
    "runner": 5,
    "procedures": 6,
    "plots": 7,
    "report": 7,
    "chapters": 7,
    "tuning": 7,
    "cli": 7,
    "__main__": 7,
}
# What a module may import beyond "its own floor or a lower one".
FORBIDDEN = {
    "records": {"trials"},  # knows nothing of training
    "analysis": {"trials"},  # reads a record, whoever produced it
    "zoo": {"records", "analysis", "runner", "procedures"},
}


def top(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The direct children of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "playbook_optax" and len(parts) > 1:
                yield parts[1]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_module_has_a_floor():
    assert {top(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    mine = top(path)
    for other in imports(path):
        if other not in FLOORS:
            continue  # a name such as __version__
        assert FLOORS[other] <= FLOORS[mine], f"{path} imports {other}, a higher floor"
        assert other not in FORBIDDEN.get(mine, ()), f"{path} may not import {other}"


def run(script):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )


def test_importing_starts_no_backend():
    out = run(
        "import sys, playbook_optax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "heavy = {'matplotlib', 'sklearn', 'jinja2', 'tyro', 'pandas', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert out.returncode == 0, out.stderr


WITHOUT_EXTRAS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "sklearn", "jinja2", "tyro"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import jax, jax.numpy as jnp, numpy as np
import playbook_optax as pbx
workload = pbx.Workload(
    name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
    loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
    evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
study = pbx.run_study(workload, lambda p: pbx.sgd(p["learning_rate"]),
    {"learning_rate": np.array([0.1, 0.2], np.float32)}, num_steps=3, eval_every=1,
    key=jax.random.key(0))
assert study.best().trial == 1
assert pbx.diagnose(study)
from playbook_optax import cli, plots, report, zoo
for use, extra in (
    (lambda: plots.plot_axes(study), "plots"),
    (lambda: zoo.digits_mlp(), "data"),
    (lambda: report.write_report(study, "unused"), "report"),
):
    try:
        use()
    except ImportError as error:
        assert f"playbook-optax[{extra}]" in str(error), error
    else:
        raise AssertionError(extra)
"""


def test_the_core_needs_no_extra_and_what_does_names_it():
    out = run(WITHOUT_EXTRAS)
    assert out.returncode == 0, out.stderr


def test_public_names_exist_once():
    assert len(set(playbook_optax.__all__)) == len(playbook_optax.__all__)
    for name in playbook_optax.__all__:
        assert getattr(playbook_optax, name) is not None
