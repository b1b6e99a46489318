"""What a cell of a notebook shows: a table, a picture, each plot once, and lines as they come."""

import pytest

CELLS = (
    """
import sys
import jax, jax.numpy as jnp, numpy as np
import playbook_optax as pbx
workload = pbx.Workload(
    name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
    loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
    evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
points = {"learning_rate": np.float32([0.1, 0.2, 0.3])}
study = pbx.run_study(workload, lambda p: pbx.sgd(p["learning_rate"]), points, num_steps=4,
                      eval_every=2, key=jax.random.key(0))
""",
    "study",
    "pbx.StudySet({'a': study})",
    "pbx.plots.plot_axes(study)",
    "pbx.plots.plot_curves(study)",
    "pbx.plots.plot_axis(study, 'learning_rate')",
    "pbx.plots.plot_curves(study, ax=pbx.plots.plot_axis(study, 'learning_rate'))",
    "import matplotlib.pyplot as plt; plt.get_fignums()",
)


@pytest.fixture(scope="module")
def outputs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # The command line sets it.
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def kinds(output):
    return set(output.get("data", {}))


def num_pictures(outputs):
    return sum("image/png" in kinds(output) for output in outputs)


def test_what_goes_on_is_told_in_the_page_and_not_as_an_error(outputs):
    told = [output["data"]["text/plain"] for output in outputs[0] if "data" in output]
    assert not [output for output in outputs[0] if output.output_type == "stream"]
    assert told[0].startswith("square: tracing took ")
    assert told[-1].startswith("square: training 3 trials x 4 steps took ")


@pytest.mark.parametrize("cell", [1, 2])
def test_a_study_is_a_table_and_a_picture(outputs, cell):
    (shown,) = outputs[cell]
    assert shown["data"]["text/html"].count("<img ") == 1
    assert "learning_rate=0.3" in shown["data"]["text/html"]
    assert "best" in shown["data"]["text/plain"]


@pytest.mark.parametrize("cell", [3, 4, 5, 6])
def test_a_plot_is_shown_once(outputs, cell):
    assert num_pictures(outputs[cell]) == 1


def test_no_figure_is_left_open(outputs):
    assert outputs[-1][0]["data"]["text/plain"] == "[]"
