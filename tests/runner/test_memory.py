"""What fits: the width of a block is halved before the first block, and named after it."""

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage
from playbook_optax.runner import devices, execute, plan
from playbook_optax.runner.run import StudyRunner
from playbook_optax.trials.stepper import Stepper

ARGUMENTS = {"num_steps": 6, "eval_every": 3, "key": jax.random.key(0), "progress": False}
RATES = {"learning_rate": np.geomspace(1e-3, 0.3, 16).astype(np.float32)}


def study(**arguments):
    return pbx.run_study(tiny.noisy_quadratic(), tiny.momentum, RATES, **{**ARGUMENTS, **arguments})


def needed(width):
    """Bytes that one block of this width needs on a device."""
    arguments = {name: value for name, value in ARGUMENTS.items() if name != "progress"}
    trainer = pbx.Trainer(tiny.noisy_quadratic(), tiny.momentum, trials_per_block=width)
    runner = StudyRunner(trainer, RATES, **arguments)
    return runner.engine(width, 1).memory


def test_memory_grows_with_the_width():
    assert needed(1) < needed(2) < needed(8)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the widths are those of a CPU")
@pytest.mark.parametrize("directory", [False, True])
def test_a_chosen_width_is_halved_until_it_fits(tmp_path, monkeypatch, directory):  # 55
    usual = study()
    assert usual.spec["trials_per_block"] == 8
    # One block of four on a device, and not two of them.
    free = needed(4)
    monkeypatch.setattr(devices, "free_memory", lambda mesh: free)
    where = {"directory": tmp_path} if directory else {}
    narrow = study(**where)
    assert narrow.spec["trials_per_block"] == 4
    np.testing.assert_allclose(
        narrow.data["valid/loss"], usual.data["valid/loss"], rtol=1e-4, equal_nan=True
    )
    same = study(trials_per_block=4)
    np.testing.assert_array_equal(narrow.data["valid/loss"], same.data["valid/loss"])


def test_a_given_width_is_an_error_that_names_one_that_fits(tmp_path, monkeypatch):  # 55
    free = needed(2)
    monkeypatch.setattr(devices, "free_memory", lambda mesh: free)
    with pytest.raises(MemoryError, match="use trials_per_block=2"):
        study(trials_per_block=8, directory=tmp_path)
    assert storage.finished_blocks(tmp_path) == []
    monkeypatch.setattr(devices, "free_memory", lambda mesh: 1)
    with pytest.raises(MemoryError, match="one trial alone does not fit"):
        study()


def running_out(monkeypatch, too_wide):
    """Makes the device run out of memory with blocks of these widths."""
    original = execute.Engine._train

    def train(self, *args):
        if self._width in too_wide:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return original(self, *args)

    monkeypatch.setattr(execute.Engine, "_train", train)


def test_running_out_before_the_first_block_halves_the_width(tmp_path, monkeypatch):
    running_out(monkeypatch, {8, 4})
    found = study(directory=tmp_path)
    assert found.spec["trials_per_block"] == 2
    assert storage.read_spec(tmp_path)["trials_per_block"] == 2
    assert study(directory=tmp_path).spec["trials_per_block"] == 2


def test_running_out_later_names_the_width_to_use(tmp_path, monkeypatch):
    first = pbx.run_study(
        tiny.noisy_quadratic(),
        tiny.momentum,
        tiny.SPACE,
        num_trials=8,
        **ARGUMENTS,
        directory=tmp_path,
    )
    assert first.spec["trials_per_block"] == 8
    running_out(monkeypatch, {8})
    with pytest.raises(MemoryError, match="use trials_per_block=4"):
        pbx.run_study(
            tiny.noisy_quadratic(),
            tiny.momentum,
            tiny.SPACE,
            num_trials=16,
            **ARGUMENTS,
            directory=tmp_path,
        )
    assert pbx.load_study(tmp_path).num_trials >= 8
    with pytest.raises(MemoryError, match="use trials_per_block=4"):
        study(trials_per_block=8)


def test_other_errors_of_the_device_are_not_taken_for_it(monkeypatch):
    def train(self, *args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(execute.Engine, "_train", train)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        study()


def test_free_memory_of_this_machine():
    mesh = devices.trial_mesh(None)
    free = devices.free_memory(mesh)
    assert free is None or 0 < free < 2**50


def test_steps_decide_the_width_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    stepper = Stepper(tiny.noisy_quadratic(), tiny.momentum, None, False)
    key = pbx.trial_key(jax.random.key(0))
    point = {name: values[0] for name, values in RATES.items()}
    assert plan.choose_width(stepper, point, key, stepper.workload.data, None) == 512
