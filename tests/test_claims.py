"""The page on the playbook's claims says what the stored results say."""

import json

import numpy as np

from benchmarks.claims import stability


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
