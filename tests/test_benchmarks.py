"""The arithmetic of the benchmarks of speed, and that their contenders train the same trials."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import playbook_optax as pbx
from benchmarks.first_answer import __main__ as first_answer
from benchmarks.first_answer import rows, sides
from benchmarks.speed import __main__ as command
from benchmarks.speed import contenders, features, roofline, suite, table, worker, workloads


def test_the_readme_holds_the_table_of_the_stored_results():
    text = table.README.read_text()
    assert table.splice(text, table.block()) == text
    stored = [json.loads(path.read_text()) for path in table.RESULTS.glob("speed_*.json")]
    assert stored
    for results in stored:
        quick = any(result["quick"] for result in results["results"].values())
        assert ("*From a quick run" in table.markdown(results)) == quick


def test_ratios_are_of_one_round_and_their_quartiles_are_numpys():
    assert table.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        table.ratios([1.0, 2.0], [1.0])
    assert table.summary([1.0, 2.0, 4.0, 3.0, 5.0]) == {"ratio": 3.0, "ratio_quartiles": [2.0, 4.0]}
    assert table.summary([1.23456]) == {"ratio": 1.235, "ratio_quartiles": [1.235, 1.235]}


def test_the_share_of_the_ideal_saving():
    # Half of the trials train a tenth of the run: ideally 0.55 of the time.
    assert table.saving_share(0.55, 0.5, 0.1) == pytest.approx(1.0)
    assert table.saving_share(1.0, 0.5, 0.1) == 0.0
    assert table.saving_share(0.775, 0.5, 0.1) == pytest.approx(0.5)


def test_flops_by_hand_are_those_of_three_products_but_one():
    # Two layers, 3 -> 4 -> 5, batch 2: forward and weights of both, inputs of the second.
    assert roofline.mlp_flops(2, (3, 4, 5)) == 2 * 2 * (2 * 3 * 4 + 3 * 4 * 5)
    assert roofline.mlp_flops(128, (64, 128, 10)) == 5_177_344


@pytest.mark.parametrize("name", sorted(suite.MLP_SIZES))
def test_xla_counts_the_products_and_little_else(name):
    by_hand = roofline.mlp_flops(*suite.MLP_SIZES[name])
    counted = roofline.step_costs(name)["flops"]
    batch, sizes = suite.MLP_SIZES[name]
    # Activations, softmax and momentum: a few operations for each unit and each weight.
    few = 20 * (batch * sum(sizes) + sum(a * b for a, b in itertools.pairwise(sizes)))
    assert by_hand <= counted <= by_hand + few


STORED = {
    "platform": "cpu",
    "device": "cpu",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"jax": "0.10.2", "torch": "2.0"},
    "results": {
        key: {**result, "quick": False, "data": "digits", "date": date}
        for key, date, result in (
            (
                "steady/tiny/8",
                "2026-01-01",
                {
                    "contenders": {
                        "study_ends": {
                            "microseconds": 4.0,
                            "ratio": 0.9,
                            "ratio_quartiles": [0.8, 0.95],
                        },
                        "loop": {"ratio": 35.21, "ratio_quartiles": [34.0, 36.06]},
                        "recompile": {"ratio": 1234.5, "ratio_quartiles": [1234.5, 1234.5]},
                    }
                },
            ),
            (
                "steady/tiny/1",
                "2026-01-01",
                {
                    "contenders": {
                        "study_ends": {
                            "microseconds": 8.0,
                            "ratio": 1.0,
                            "ratio_quartiles": [1.0, 1.0],
                        }
                    }
                },
            ),
            (
                "roofline/device",
                "2026-01-02",
                {"flops_per_second": 1e11, "bytes_per_second": 2e10},
            ),
            ("roofline/tiny", "2026-01-02", {"flops": 80_000.0, "least_bytes": 20_000.0}),
            ("memory/tiny/8", "2026-01-02", {"num_trials": 8, "bytes": 123_456_789}),
            ("transforms", "2026-01-02", {"adam": {"ratio": 0.9, "ratio_quartiles": [0.8, 1.0]}}),
        )
    },
}


def test_the_table_is_made_of_the_results():
    assert table.markdown(STORED).splitlines() == [
        "**Some CPU, 2 cores; jax 0.10.2, torch 2.0; 2026-01-01 to 2026-01-02.**",
        "",
        "| time of … / time of a study | 1 trial | 8 trials |",
        "| --- | --- | --- |",
        "| **tiny MLP 64-16-10, batch 16** |  |  |",
        "| a jitted step, called for each trial and step | – | 35.2 (34–36.1) |",
        "| a step compiled for each trial | – | 1,234 |",
        "| a study evaluated only before and after | 1 | 0.9 (0.8–0.95) |",
        "",
        "|  | tiny MLP 64-16-10 |",
        "| --- | --- |",
        # 80,000 flops in 4 microseconds are 2e10 a second, of 1e11; 20,000 bytes are 5e9, of 2e10.
        "| share of the measured product rate | 20% |",
        "| share of the measured copy rate | 25% |",
        "| peak memory of 8 trials, compiling included, MB | 123 |",
        "",
        "An update of ours / of Optax's namesake, ten layers: adam 0.9 (0.8–1).",
    ]


def test_a_text_is_spliced_between_its_markers_only():
    text = f"before {table.BEGIN} old {table.END} after"
    assert table.splice(text, "new") == f"before {table.BEGIN}\n\nnew\n\n{table.END} after"
    with pytest.raises(ValueError, match="once each"):
        table.splice("no marker", "new")


@pytest.mark.slow
def test_contenders_train_the_trial_that_a_study_trains():
    fixed, rate, num_steps = jax.random.key(0), jnp.float32(0.1), 5
    tiny = workloads.CASES["tiny"].build()
    # A study folds its key before it hands it on; here nothing hangs on that.
    work = dataclasses.replace(
        tiny,
        init=lambda key: tiny.init(fixed),
        batch=lambda data, key, step: tiny.batch(data, fixed, step),
    )
    train = pbx.make_train(
        work, workloads.make_optimizer, num_steps=num_steps, eval_every=5, keep="final"
    )
    want = jax.jit(train)({"learning_rate": rate}, fixed, work.data).params
    got = contenders.plain_scan(work, num_steps, rate, fixed, work.data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    # And the trial has moved.
    start, _ = work.init(fixed)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), got, start)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "tiny"])
def test_synthetic_data_have_the_shapes_of_the_digits(name, monkeypatch):
    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

    real = workloads.CASES[name].build()
    monkeypatch.setattr(workloads, "data_source", lambda: "synthetic")
    made = workloads.CASES[name].build()
    assert made.name == "synthetic"
    assert shapes(made.data) == shapes(real.data)
    want, got = (jax.eval_shape(work.init, jax.random.key(0)) for work in (real, made))
    assert shapes(want) == shapes(got)
    key, step = jax.random.key(0), jnp.int32(0)
    want, got = (jax.eval_shape(work.batch, work.data, key, step) for work in (real, made))
    assert shapes(want) == shapes(got)


def test_diverging_trials_stop_where_they_are_said_to():
    made = features.Diverging("tiny", 4, 20, 0.5)
    assert made.facts == {"fraction": 0.5, "num_infeasible": 2, "infeasible_step": 1}


def test_numbers_of_steps_are_looked_up_by_the_nearest_number_of_trials():
    assert workloads.num_steps("mlp", 64, True, False) == 400
    assert workloads.num_steps("mlp", 100, True, False) == 400
    assert workloads.num_steps("mlp", 512, False, False) == 1000
    assert workloads.num_steps("lm", 512, True, True) == 8
    low, high = workloads.CASES["mlp"].rates
    np.testing.assert_allclose(workloads.rates("mlp", 3), [low, np.sqrt(low * high), high], 1e-6)


def test_a_worker_answers_says_what_failed_and_how_it_died():
    with worker.Worker() as process:
        assert process.call("benchmarks.speed.table:rounded", value=1.23456) == 1.235
        with pytest.raises(RuntimeError, match=r"(?s)failed in its worker.*Unknown format code"):
            process.call("benchmarks.speed.table:rounded", value="x")
        # It goes on after an error.
        assert process.call("benchmarks.speed.table:rounded", value=2.0) == 2.0
        with pytest.raises(RuntimeError, match="died in os:_exit, with 3"):
            process.call("os:_exit", status=3)


def test_the_command_names_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "mpl"])
    assert "['mpl'] unknown; known: mlp, cnn, lm, tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("cnn", "lm") else ())
        for name in sorted(workloads.CASES)
    ],
)
def test_torch_models_have_as_many_weights_and_the_same_outputs(name):
    torch = pytest.importorskip("torch")
    torch_models = pytest.importorskip("benchmarks.speed.torch_models")
    work = workloads.CASES[name].build()
    params, _ = work.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) / 4, params)
    for fused in (True, False):
        net = torch_models.model(name, fused).cpu()
        net.load_state_dict({k: torch.tensor(v) for k, v in translated(name, params).items()})
        if name == "lm":
            windows = work.data["train_windows"][:16]
            x, y = torch.tensor(windows[:, :-1].astype(int)), windows[:, 1:]
            batch = windows
        else:
            x, y = work.data["train"]["x"][:16], work.data["train"]["y"][:16]
            batch = {"x": x, "y": y}
            x = torch.tensor(np.array(x.transpose(0, 3, 1, 2) if name == "cnn" else x))
        got = torch_models.mean_loss(net(x), torch.tensor(np.array(y), dtype=torch.int64))
        want, _ = work.loss(params, {}, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
        np.testing.assert_allclose(got.item(), want, rtol=1e-4)


def translated(name, params):
    """Flax's weights under PyTorch's names: kernels transposed, images with channels first."""

    def dense(theirs, ours):
        return {f"{theirs}.weight": ours["kernel"].T, f"{theirs}.bias": ours["bias"]}

    if name in ("mlp", "tiny"):
        return dense("0", params["Dense_0"]) | dense("2", params["Dense_1"])
    if name == "cnn":
        # After the flattening, (channel, row, column) where Flax has (row, column, channel).
        kernel = params["Dense_0"]["kernel"].reshape(4, 4, 32, 10).transpose(2, 0, 1, 3)
        found = dense(
            "head", {"kernel": kernel.reshape(512, 10), "bias": params["Dense_0"]["bias"]}
        )
        for theirs, ours in (("first", "Conv_0"), ("second", "Conv_1")):
            found[f"{theirs}.weight"] = params[ours]["kernel"].transpose(3, 2, 0, 1)
            found[f"{theirs}.bias"] = params[ours]["bias"]
        return found
    found = {"embed.weight": params["embed"]["embedding"], "positions": params["positions"]}
    found |= dense("head", params["head"])
    for i in range(4):
        attention, feedforward = params[f"attention_{i}"], params[f"feedforward_{i}"]
        found |= dense(f"layers.{i}.qkv", attention["qkv"])
        found |= dense(f"layers.{i}.project", attention["project"])
        found |= dense(f"layers.{i}.expand", feedforward["expand"])
        found |= dense(f"layers.{i}.contract", feedforward["project"])
        for kind in ("attention", "feedforward"):
            norm = params[f"residual_{kind}_{i}"]["norm"]
            found[f"layers.{i}.norm_{kind}.weight"] = norm["scale"]
            found[f"layers.{i}.norm_{kind}.bias"] = norm["bias"]
    return found


def played(value, above, below):
    seconds = {
        "second": {"cpu": above, "wall": 2 * above},
        "first": {"cpu": below, "wall": below},
    }
    return rows.Round(value, seconds, {"fact": value})


def test_a_row_is_the_median_of_its_rounds_and_its_target_has_a_direction():
    found = rows.result(rows.ROWS["again"], [played(0.2, 2, 10), played(0.04, 1, 25)])
    assert found == {
        "of": "cpu",
        "target": "<= 0.05",
        "ratio": 0.12,
        "min": 0.04,
        "max": 0.2,
        "holds": False,
        "num_rounds": 2,
        "seconds": {"second": {"cpu": 1.5, "wall": 3.0}, "first": {"cpu": 17.5, "wall": 17.5}},
        "fact": 0.04,
    }
    long = rows.result(rows.ROWS["long_mlp"], [played(4.5, 9, 2)])
    assert long["target"] == ">= 4.5"
    assert long["holds"]
    assert not rows.ROWS["long_mlp"].holds(4.4)
    assert rows.markdown({"long_mlp": long, "again": found}).splitlines() == [
        "| row | ratio | target | holds |",
        "| --- | --- | --- | --- |",
        "| again (cpu) | 0.12 (0.04–0.2) | <= 0.05 | no |",
        "| long_mlp (wall) | 4.5 | >= 4.5 | yes |",
    ]


def test_sides_take_turns_and_their_ratio_is_the_first_over_the_second():
    called = []

    def side(name):
        return lambda: called.append(name) or name

    for number in range(3):
        assert rows.in_turns(number, side("a"), side("b")) == ["a", "b"]
    assert called == ["a", "b", "b", "a", "a", "b"]
    seconds = played(0, 3.0, 4.0).seconds
    assert (rows.ratio("cpu", seconds), rows.ratio("wall", seconds)) == (0.75, 1.5)


def test_a_side_that_fails_is_told_with_its_error():
    with pytest.raises(RuntimeError, match=r"(?s)failed in its process.*is unknown"):
        rows.child("calls", change="nothing", num_trials=1, num_steps=1)


def test_first_answer_names_what_it_does_not_know_and_what_it_leaves_out(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        first_answer.main(["--rows", "agian"])
    assert "['agian'] unknown; known: again, other_num_steps" in capsys.readouterr().err
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    assert set(rows.ROWS) - set(rows.available(False)) == {"tune", "tune_transformer"}
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: name)
    assert set(rows.ROWS) - set(rows.available(True)) == {"tune_transformer"}
    called = []
    monkeypatch.setattr(rows, "run", lambda *args: called.append(args))
    first_answer.main(["--quick", "--rows", "tune_transformer,again"])
    assert called == [(("again",), 1, True, None)]
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("again", set()),
        ("other_num_steps", {"num_steps"}),
        ("other_num_trials", {"num_trials"}),
        ("other_num_seeds", {"num_seeds"}),
        ("other_range", {"points"}),
        ("equal_optimizer", {"make_optimizer", "make_schedule"}),
    ],
)
def test_a_second_call_differs_in_what_the_row_says(change, arguments):
    study = sides._study(24, 200)
    other = sides._changed(change, study)
    assert {name for name in other if other[name] is not study.get(name)} == arguments
    assert list(other["points"]) == ["learning_rate", "b1", "eps", "b2"]
    assert (study["eval_every"], other["eval_every"]) == (10, 10)
    if change == "other_range":
        assert other["points"]["learning_rate"] != study["points"]["learning_rate"]
    if change == "equal_optimizer":
        assert all(other[name].__code__ is study[name].__code__ for name in arguments)


@pytest.mark.slow
def test_the_scan_people_write_trains_the_trial_that_a_study_trains():
    fixed, num_steps = jax.random.key(0), 40
    real = sides._study(1, num_steps)
    # A study folds its key before it hands it on; here nothing hangs on that.
    work = dataclasses.replace(
        real["workload"],
        init=lambda key: real["workload"].init(fixed),
        batch=lambda data, key, step: real["workload"].batch(data, fixed, step),
    )
    # Where eps stands, ours and Optax's Adam differ.
    point = {"learning_rate": 0.01, "b1": 0.8, "eps": 1e-12, "b2": 0.99}
    point = {name: jnp.float32(value) for name, value in point.items()}
    train = pbx.make_train(
        work, real["make_optimizer"], num_steps, 2, make_schedule=real["make_schedule"]
    )
    want = jax.jit(train)(point, fixed, work.data).metrics
    got, losses = jax.jit(sides.trial(work, num_steps))(point, fixed, work.data)
    assert {len(values) for values in got.values()} == {sides.EVALS + 1}
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(losses, want["step/loss"][1:], rtol=1e-3, atol=1e-4)
    # And the trial has learned.
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_first_answer_stores_rows_beside_those_of_other_runs(tmp_path, capsys):
    path = tmp_path / "found.json"
    chosen = [name for name in ("again", "tune", "long_mlp") if name in rows.available(True)]
    for name in chosen:
        first_answer.main(["--quick", "--rows", name, "--out", str(path)])
    stored = json.loads(path.read_text())
    assert list(stored["results"]) == chosen
    assert stored["devices"] == suite.num_cores()
    for found in stored["results"].values():
        assert found["quick"]
        above, below = (cost[found["of"]] for cost in found["seconds"].values())
        assert found["ratio"] == pytest.approx(above / below, rel=1e-3)
    # Nothing was taken from a cache of compiled programs: the tests have one.
    assert stored["results"]["again"]["seconds"]["first"]["cpu"] > 0.5
    assert "| again (cpu) |" in capsys.readouterr().out
