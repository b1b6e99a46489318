"""The pages on the playbook's claims say what the stored results say."""

import itertools
import json

import jax
import numpy as np
import tiny_workloads as tiny

import playbook_optax as pbx
from benchmarks.claims import batch_size, stability, tuning


def test_the_page_is_made_of_the_stored_results():
    assert (stability.RESULTS / "README.md").read_text() == stability.page()


def test_every_case_has_a_result_with_its_raw_numbers():
    for name, case in stability.CASES.items():
        result = json.loads((stability.RESULTS / f"{name}.json").read_text())
        assert (result["num_steps"], result["num_seeds"]) == (case.num_steps, stability.NUM_SEEDS)
        for row in result["rows"]:
            raw = result["raw"][row["study"]]
            if row["best_trial"] >= 0 and row["remedy"] != "lower_learning_rate":
                seeds = row["best_value_per_seed"]
                np.testing.assert_allclose(np.mean(seeds), row["best_value"], rtol=1e-5)
                assert (
                    raw["points"]["learning_rate"][row["best_trial"]] == row["best_learning_rate"]
                )


def test_an_interval_is_students():
    mean, half = stability.interval([1.0, 2.0, 3.0])
    # t of two degrees of freedom at 97.5% is 4.3027; the standard error is 1 / sqrt(3).
    np.testing.assert_allclose([mean, half], [2.0, 4.3027 / np.sqrt(3)], rtol=1e-4)


def test_the_page_of_tune_is_made_of_the_stored_results():
    assert (tuning.RESULTS / "tuning.md").read_text() == tuning.page()
    files = sorted(tuning.RESULTS.glob("tune_*.json"))
    assert len(files) >= 4
    for file in files:
        stored = json.loads(file.read_text())
        case = tuning.CASES[stored["workload"]]
        assert stored["metric"] == case.metric
        assert list(stored["seeds"]) == [str(seed) for seed in range(case.num_seeds)]
        total = stored["num_trials"] * stored["num_steps"]
        for found in stored["seeds"].values():
            assert set(found) == set(tuning.NAMES) == set(tuning.MAKERS)
            assert all(len(row["test"]) == case.num_runs for row in found.values())
            assert all(row["spent"] <= total for row in found.values())


def test_differences_are_paired():
    stored = {
        "seeds": {
            "0": {"tune": {"test": [1.0, 2.0]}, "adam": {"test": [1.5, 2.5]}},
            "1": {"tune": {"test": [3.0, 4.0]}, "adam": {"test": [3.5, 4.5]}},
        }
    }
    assert tuning.compared(stored, "adam") == {"mean": 3.0, "difference": 0.5, "error": 0.0}


def test_final_runs_are_trials():
    work, key = tiny.mlp(), jax.random.key(3)
    contender = tuning.Contender(pbx.momentum(0.1, 0.9), 40, tuning._as_trained, {})
    values, weights = tuning.final_runs(work, contender, [key])
    train = jax.jit(pbx.make_train(work, lambda _: pbx.momentum(0.1, 0.9), 40, 2, keep="best"))
    result = train({}, key, work.data)
    assert values == [float(result.best_value)]
    for one, other in zip(
        jax.tree.leaves(weights[0][0]), jax.tree.leaves(result.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_candidate_that_broke_is_not_the_best():  # 44
    study = pbx.Study.from_arrays(
        {"x": [0.0, 1.0, 2.0]},
        {"loss": [[[0.1], [0.1]], [[0.4], [0.2]], [[0.5], [0.3]]]},
        [10],
        objective="loss",
        infeasible=[[False, True], [False, False], [False, False]],
    )
    best, errors = batch_size.best_candidate(study)
    assert (best, errors.tolist()) == (1, [0.4, 0.2])


def test_the_page_on_batch_sizes_is_made_of_the_stored_results():
    assert (batch_size.RESULTS / "batch_size.md").read_text() == batch_size.page()
    stored = json.loads((batch_size.RESULTS / "batch_size.json").read_text())
    told = [(row["seed"], row["batch_size"]) for row in stored["rows"]]
    assert told == list(itertools.product(batch_size.SEEDS, batch_size.BATCH_SIZES))
    for row in stored["rows"]:
        assert len(row["valid"]) == len(row["test"]) == batch_size.NUM_RUNS
