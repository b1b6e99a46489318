"""`Study.replay`: the bits of the study, every step recorded, up to the moment it broke."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.runner.run import StudyRunner

KEY = jax.random.key(0)
RATES = {"learning_rate": np.array([0.03, 0.3, 3000.0, 0.1, 0.5], np.float32)}


def study_of(workload=None, points=RATES, make_optimizer=tiny.momentum, **arguments):
    return pbx.run_study(
        workload or tiny.noisy_quadratic(),
        make_optimizer,
        points,
        **{"num_steps": 20, "eval_every": 6, "key": KEY, "progress": False, **arguments},
    )


@pytest.mark.parametrize(
    ("width", "independent"),
    [
        (1, True),
        (4, False),
        (1, False),
        (4, True),
    ],
)
def test_a_replay_has_the_bits_of_the_study(width, independent):
    study = study_of(tiny.mlp(), num_seeds=2, independent=independent, trials_per_block=width)
    for trial, seed in ((1, 1), (4, 0)):
        replayed = study.replay(trial, seed=seed)
        assert replayed.attrs["bit_exact"] is True
        assert replayed["step"].values.tolist() == list(range(20))
        run = study.data.isel(trial=trial, seed=seed)
        loss, norm = replayed["loss"].values, replayed["gradient_norm"].values
        for index, (start, stop) in enumerate(itertools.pairwise(run["step"].values), start=1):
            # The order of a float32 sum is the only freedom.
            mean = np.float32(loss[start:stop].astype(np.float64).mean())
            np.testing.assert_allclose(run["step/loss"].values[index], mean, rtol=1e-6)
            assert run["step/peak_gradient_norm"].values[index] == norm[start:stop].max()
        assert run["norms/last"].item() == norm[-1]
        assert run["norms/max"].item() == norm.max()


def test_a_replay_from_the_middle_is_the_end_of_the_whole():
    study = study_of(trials_per_block=2)
    whole, part = study.replay(1), study.replay(1, 7, num_steps=5)
    assert part["step"].values.tolist() == [7, 8, 9, 10, 11]
    for name in whole.data_vars:
        assert part[name].values.tobytes() == whole[name].values[7:12].tobytes()


def test_a_replay_ends_at_the_update_that_broke():
    study = study_of(points={"learning_rate": np.array([0.1, 1e6], np.float32)})
    broken = int(study.data["infeasible_step"][1])
    replayed = study.replay(1)
    assert replayed.attrs["infeasible_step"] == broken == int(replayed["step"][-1])
    assert replayed.attrs["infeasible_reason"] == str(study.data["infeasible_reason"].values[1])
    assert replayed.attrs["bit_exact"]
    assert np.isfinite(replayed["update_norm"].values[:-1]).all()
    assert np.isnan(replayed["update_norm"].values[-1])
    assert study.replay(1, broken + 1).sizes["step"] == 0


def test_norms_of_layers_are_those_of_gradient_descent():
    points = {"learning_rate": np.float32([0.25])}
    study = study_of(tiny.mlp(), points, tiny.sgd)
    replayed = study.replay(0, 3, num_steps=4, per_layer=True)
    assert replayed["layer"].values.tolist() == ["bias", "hidden", "out"]
    for whole, parts in (
        ("gradient_norm", "layer_gradient_norm"),
        ("update_norm", "layer_update_norm"),
        ("param_norm", "layer_param_norm"),
    ):
        squares = np.sum(replayed[parts].values.astype(np.float64) ** 2, axis=1)
        np.testing.assert_allclose(np.sqrt(squares), replayed[whole].values, rtol=1e-5)
    # Subtracting parameters costs digits of a small update: 1e-7 of a weight in 1e-3 of it.
    np.testing.assert_allclose(
        replayed["update_norm"].values, 0.25 * replayed["gradient_norm"].values, rtol=1e-4
    )


def test_host_batches_are_replayed():
    (x, y), _ = tiny.blobs()

    def host_batches(start_step):
        for step in itertools.count(start_step):
            rows = np.arange(step * 8, step * 8 + 8) % len(x)
            yield {"x": x[rows], "y": y[rows].astype(np.int32)}

    def loss(params, state, batch, key):
        logits = tiny.mlp_apply(params, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean(), (state, {})

    workload = pbx.Workload(
        name="host",
        init=lambda key: (tiny.mlp_init(key), {}),
        loss=loss,
        batch=None,
        host_batches=host_batches,
        evaluate=lambda params, state, data: {"valid/loss": jnp.sum(params["out"] ** 2)},
        objective="valid/loss",
        version="1",
    )
    study = study_of(workload, trials_per_block=2)
    replayed = study.replay(3, 4)
    assert replayed.attrs["bit_exact"]
    assert replayed.sizes["step"] == 16


def test_an_impure_workload_is_told():
    made = []

    def host_batches(start_step):
        made.append(start_step)
        return (np.float32([len(made)]) for _ in itertools.count())

    changing = pbx.Workload(
        name="impure",
        init=lambda key: (jnp.ones(2), {}),
        loss=lambda params, state, batch, key: (jnp.sum(batch * params**2), (state, {})),
        batch=None,
        host_batches=host_batches,
        evaluate=lambda params, state, data: {"valid/loss": jnp.sum(params**2)},
        objective="valid/loss",
        version="1",
    )
    study = study_of(changing, points={"learning_rate": np.float32([1e-3])})
    with pytest.warns(UserWarning, match="not equal to it bit for bit"):
        replayed = study.replay(0)
    assert replayed.attrs["bit_exact"] is False


def test_bad_arguments():
    study = study_of()
    with pytest.raises(IndexError, match="trial = 5"):
        study.replay(5)
    with pytest.raises(ValueError, match="from_step = 20 is not in the run"):
        study.replay(0, 20)
    with pytest.raises(ValueError, match="num_steps"):
        study.replay(0, 0, num_steps=0)
    with pytest.raises(ValueError, match="per_layer"):
        study.replay(0, per_layer=1)
    with pytest.raises(ValueError, match="cannot train"):
        pbx.Study.from_arrays(
            {"learning_rate": [0.1]}, {"valid/loss": [[1.0]]}, [3], objective="valid/loss"
        ).replay(0)
    with pytest.raises(ValueError, match="seed must be given"):
        study_of(num_seeds=2).replay(0)


def test_a_stored_study_replays_when_it_is_continued(tmp_path):
    study_of(directory=tmp_path / "study")
    again = study_of(directory=tmp_path / "study")
    assert again.replay(1, 15).attrs["bit_exact"]


def test_one_runner_compiles_once_for_all_its_studies(tmp_path):
    traces = []

    def make_optimizer(point):
        traces.append(0)
        return pbx.sgd(point["learning_rate"])

    trainer = pbx.Trainer(tiny.noisy_quadratic(), make_optimizer, progress=False)
    runner = StudyRunner(trainer, RATES, num_steps=6, eval_every=3, key=KEY)
    one = runner.run(RATES)
    traced = len(traces)
    other = {"learning_rate": np.float32([0.2, 0.3])}
    two = runner.run(other, directory=tmp_path / "two")
    # Only the fingerprint of the stored one traces; nothing is compiled again.
    assert len(traces) - traced <= 3
    fresh = pbx.run_study(
        tiny.noisy_quadratic(), tiny.sgd, other, num_steps=6, eval_every=3, key=KEY, progress=False
    )
    for name in fresh.data.data_vars:
        assert two.data[name].values.tobytes() == fresh.data[name].values.tobytes()
        assert two.data[name][1].values.tobytes() == one.data[name][1].values.tobytes()
    assert pbx.load_study(tmp_path / "two").num_trials == 2
    with pytest.raises(ValueError, match="the program was made for"):
        runner.run({"learning_rate": np.array([1, 2])})
