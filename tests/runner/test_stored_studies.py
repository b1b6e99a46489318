"""What a stored study says to whoever continues it elsewhere, or reads it while it is written."""

import jax
import numpy as np
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.records import storage


def study_of(directory, points, workload=None, num_trials=None):
    return pbx.run_study(
        workload or tiny.quadratic(),
        tiny.sgd,
        points,
        num_trials=num_trials,
        num_steps=6,
        eval_every=3,
        key=jax.random.key(0),
        trials_per_block=2,
        progress=False,
        directory=directory,
    )


def test_other_dtypes_are_refused_by_name(tmp_path):  # 69
    rates = np.float32([0.5, 0.25])
    study_of(tmp_path, {"learning_rate": rates})
    with pytest.raises(ValueError, match=r"dtypes is .*float32.* there and .*float16.* here"):
        study_of(tmp_path, {"learning_rate": rates.astype(np.float16)})
    quadratic = tiny.quadratic()
    half = pbx.Workload(
        **{**vars(quadratic), "init": lambda key: ({"w": quadratic.init(key)[0]["w"] * 1}, {})}
    )
    with pytest.raises(ValueError, match="the program differs"):
        study_of(tmp_path, {"learning_rate": rates}, half)
    other_data = pbx.Workload(**{**vars(quadratic), "data": quadratic.data.astype(np.float16)})
    with pytest.raises(ValueError, match="data is"):
        study_of(tmp_path, {"learning_rate": rates}, other_data)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"device_kind": "abacus"}, "device_kind 'abacus', now "),
        ({"versions": {"jax": "0.0.1"}}, "'jax': '0.0.1'"),
    ],
)
def test_another_environment_warns_and_goes_on(tmp_path, changed, told):  # 68
    points = {"learning_rate": np.float32([0.5, 0.25])}
    study = study_of(tmp_path, points)
    storage.write_spec(tmp_path, {**storage.read_spec(tmp_path), **changed})
    with pytest.warns(UserWarning, match=rf"{told}.*not bit-exact"):
        again = study_of(tmp_path, points)
    np.testing.assert_array_equal(again.data["valid/loss"], study.data["valid/loss"])


def test_a_reader_sees_a_consistent_prefix_at_every_moment(tmp_path, monkeypatch):  # 74
    seen = []

    def read_after(function):
        def wrapped(*args, **named):
            out = function(*args, **named)
            seen.append(pbx.load_study(tmp_path))
            return out

        return wrapped

    # Whatever is put in place, or found there: specs and blocks.
    monkeypatch.setattr(storage, "_place", read_after(storage._place))
    study_of(tmp_path, tiny.SPACE, num_trials=5)
    whole = study_of(tmp_path, tiny.SPACE, num_trials=7)
    assert [study.num_trials for study in seen] == [0, 2, 4, 5, 5, 6, 7]
    for study in seen[1:]:
        n = study.num_trials
        np.testing.assert_array_equal(study.data["valid/loss"], whole.data["valid/loss"].values[:n])
