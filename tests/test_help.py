"""What `help`, a signature and tab-completion show of the public names."""

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import playbook_optax as pbx

SUBMODULES = ("plots", "procedures", "reducers", "report", "samplers", "schedules", "zoo")
# What an alias or a class looks like where its definition is shown instead of its name.
EXPANDED = ("Union[", "typing.", "collections.abc.", "jaxlib", "optax._src", "playbook_optax.")


def public():
    """Every public function and class, and the methods of these."""
    places = [pbx, *(getattr(pbx, name) for name in SUBMODULES)]
    for place in places:
        for name in place.__all__:
            value = getattr(place, name)
            if not callable(value) or not value.__module__.startswith("playbook_optax"):
                continue
            if value.__module__ == "playbook_optax.zoo.blocks":
                continue  # Flax writes the signatures of its modules.
            yield f"{place.__name__}.{name}", value
            if not inspect.isclass(value):
                continue
            for method, function in inspect.getmembers(value, inspect.isroutine):
                if not method.startswith("_") and function.__qualname__.startswith(name):
                    yield f"{place.__name__}.{name}.{method}", function


PUBLIC = dict(public())


def signature(value):
    try:
        return inspect.signature(value)
    except ValueError:  # Such as a class that Python itself makes.
        return inspect.Signature()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_signature_names_its_types_and_does_not_spell_them_out(name):
    told = str(signature(PUBLIC[name]))
    assert not [expanded for expanded in EXPANDED if expanded in told], told


@pytest.mark.parametrize("name", PUBLIC)
def test_the_names_of_types_mean_something(name):
    value = inspect.unwrap(PUBLIC[name])
    function = value.__init__ if inspect.isclass(value) else value
    place = vars(sys.modules[value.__module__])
    for hint in getattr(function, "__annotations__", {}).values():
        # Two names that only a type checker imports, and one that chex itself cannot resolve.
        if isinstance(hint, str) and not re.search("pandas|xarray|ArrayTree", hint):
            eval(hint, place)


def test_help_of_tune_can_be_read():
    text = pydoc.plain(pydoc.render_doc(pbx.tune))
    head = text.split("Tunes a workload")[0]
    assert len(head) < 700
    for name in ("WorkloadLike | Trainer", "MakeSchedule | None", "SearchSpace | None", "Recipe"):
        assert name in head
    assert "'" not in head
    assert "'" not in str(inspect.signature(pbx.run_study)).replace("'none'", "")
    assert str(inspect.signature(pbx.sgd)) == (
        "(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs"
    )


def test_completion_offers_public_names_alone():
    assert dir(pbx) == sorted({*pbx.__all__, *SUBMODULES})
    for name in SUBMODULES:
        place = getattr(pbx, name)
        assert dir(place) == sorted(place.__all__)
        assert all(hasattr(place, one) for one in place.__all__)


def test_no_public_function_of_a_submodule_is_left_out():
    for name in ("plots", "reducers", "samplers", "schedules"):
        place = getattr(pbx, name)
        own = {
            one
            for one, value in vars(place).items()
            if inspect.isfunction(value)
            and value.__module__ == place.__name__
            and not one.startswith("_")
        }
        assert own - {"as_value", "as_steps"} <= set(place.__all__)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tnue'"):
        pbx.tnue  # noqa: B018 - to be asked for is enough.


def test_submodules_are_reached_from_the_package_and_cost_nothing_before():
    script = (
        "import sys\n"
        "import playbook_optax as pbx\n"
        "assert not {'playbook_optax.zoo', 'flax', 'matplotlib'} & set(sys.modules)\n"
        "dir(pbx)\n"
        "assert 'playbook_optax.zoo' not in sys.modules\n"
        "assert callable(pbx.zoo.digits_mlp) and callable(pbx.plots.plot_axis)\n"
        "assert callable(pbx.report.write_report)\n"
        "assert 'playbook_optax.zoo' in sys.modules and 'matplotlib' not in sys.modules\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "from playbook_optax import *\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
