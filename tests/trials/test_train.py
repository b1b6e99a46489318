"""One trial: closed forms, bits across cuts, divergence as data, and the API rows of the faults."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax.trials import loop

KEY = jax.random.key(0)
NAN = np.nan


def reason(result):
    return pbx.INFEASIBLE_REASONS[int(result.infeasible_reason)]


def same_bits(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in leaves)


def custom(loss, init=lambda key: ({"w": jnp.ones(2)}, {}), batch=lambda d, k, i: i, evaluate=None):
    """A workload around one loss(params, step)."""
    return pbx.Workload(
        name="custom",
        init=init,
        loss=lambda p, s, b, k: (loss(p, b), (s, {})),
        batch=batch,
        evaluate=evaluate or (lambda p, s, d: {"valid/loss": jnp.sum(p["w"] ** 2)}),
        objective="valid/loss",
    )


def run(workload, make_optimizer=tiny.sgd, num_steps=8, eval_every=2, lr=0.1, **arguments):
    train = pbx.make_train(workload, make_optimizer, num_steps, eval_every, **arguments)
    return jax.jit(train)({"learning_rate": jnp.float32(lr)}, KEY, workload.data)


def test_gradient_descent_matches_its_closed_form():
    curvature, lr, steps = np.array([1.0, 0.1]), 0.3, 20
    workload = tiny.quadratic(tuple(curvature))
    result = run(workload, num_steps=steps, eval_every=5, lr=lr, keep="final")
    start = np.asarray(workload.init(jax.random.fold_in(KEY, 0))[0]["w"], np.float64)
    for step, value in zip(result.step, result.metrics["valid/loss"], strict=True):
        w = start * (1 - lr * curvature) ** int(step)
        np.testing.assert_allclose(value, 0.5 * (curvature * w**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(result.params["w"], start * (1 - lr * curvature) ** steps, rtol=1e-5)
    # The recorded norm is that of the gradient before the last update.
    gradient = curvature * start * (1 - lr * curvature) ** (steps - 1)
    np.testing.assert_allclose(result.norms.last_norm, np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(result.norms.max_norm, np.linalg.norm(curvature * start), rtol=1e-5)
    assert int(result.norms.num_steps) == int(result.norms.counts.sum()) == steps


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
def test_stability_limit_of_a_quadratic(beta, curvature):
    limit = 2 * (1 + beta) / curvature
    workload = tiny.quadratic((curvature,))
    result = jax.jit(
        jax.vmap(
            pbx.make_train(workload, lambda p: pbx.momentum(p["learning_rate"], beta), 400, 100),
            in_axes=(0, None, None),
        )
    )({"learning_rate": jnp.array([0.95, 1.05]) * limit}, KEY, workload.data)
    assert result.infeasible.tolist() == [False, True]


def test_evaluation_steps_and_the_last_partial_period():
    result = run(tiny.quadratic(), num_steps=7, eval_every=3)
    assert result.step.tolist() == [0, 3, 6, 7]
    assert np.isfinite(result.metrics["valid/loss"]).all()
    assert run(tiny.quadratic(), num_steps=3, eval_every=100).step.tolist() == [0, 3]


def test_step_metrics_are_means_since_the_last_evaluation():
    workload = pbx.Workload(
        name="ramp",
        init=lambda key: ({"w": jnp.zeros(())}, {}),
        loss=lambda p, s, b, k: (p["w"] * 0 + b, (s, {"twice": 2 * b})),
        batch=lambda d, k, step: step.astype(jnp.float32),
        evaluate=lambda p, s, d: {"valid/loss": p["w"]},
        objective="valid/loss",
    )
    result = run(workload, num_steps=7, eval_every=3)
    np.testing.assert_allclose(result.metrics["step/loss"], [NAN, 1.0, 4.0, 6.0])
    np.testing.assert_allclose(result.metrics["step/twice"], [NAN, 2.0, 8.0, 12.0])


@pytest.mark.parametrize("cuts", [(1, 2), (3,), (2, 5, 6), tuple(range(1, 8))])
def test_any_cut_gives_the_same_bits(cuts):
    workload = tiny.mlp()
    trial = pbx.make_trial(workload, tiny.momentum, 8, 3, keep="best")
    advance = jax.jit(trial.advance)
    start = jax.jit(trial.init)({"learning_rate": 0.1}, KEY, workload.data)
    whole = advance(start, workload.data, 0, 8)
    state, done = start, 0
    for stop in (*cuts, 8):
        state = advance(state, workload.data, done, stop)
        done = stop
    assert same_bits(trial.result(whole), trial.result(state))
    assert advance._cache_size() == 1


def test_chunks_of_steps_as_on_an_accelerator_change_no_bit(monkeypatch):
    workload = tiny.mlp()
    points = {"learning_rate": jnp.float32([0.1, 1e30, 0.02])}

    def trained(steps_per_chunk, cuts):
        monkeypatch.setattr(loop, "steps_per_chunk", lambda: steps_per_chunk)
        trial = pbx.make_trial(workload, tiny.momentum, 11, 5, keep="best")
        advance = jax.jit(jax.vmap(trial.advance, (0, None, None, None)))
        state, done = jax.vmap(trial.init, (0, None, None))(points, KEY, workload.data), 0
        for stop in (*cuts, 11):
            state, done = advance(state, workload.data, done, stop), stop
        assert state.step.tolist() == [11, 11, 11]
        return jax.vmap(trial.result)(state)

    plain = trained(1, ())
    assert plain.infeasible.tolist() == [False, True, False]
    assert same_bits(plain, trained(4, ()))
    assert same_bits(plain, trained(4, (2, 7)))


def test_the_state_is_a_legal_carry():
    workload = tiny.mlp()
    trial = pbx.make_trial(workload, tiny.momentum, 8, 3, keep="best")
    start = jax.jit(trial.init)({"learning_rate": 0.1}, KEY, workload.data)
    after = jax.jit(trial.advance)(start, workload.data, 0, 3)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_user_line_traces_once_and_agrees_with_a_loop():
    workload = tiny.mlp()
    traces = []

    def make_optimizer(point):
        traces.append(point)
        return tiny.momentum(point)

    train = pbx.make_train(workload, make_optimizer, 10, 5)
    sweep = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
    points = {"learning_rate": jnp.array([0.01, 0.1, 0.3])}
    together = sweep(points, KEY, workload.data)
    count = len(traces)
    sweep({"learning_rate": jnp.array([0.5, 0.1, 0.2])}, KEY, workload.data)
    assert len(traces) == count
    alone = jax.jit(train)
    for i in range(3):
        one = alone({"learning_rate": points["learning_rate"][i]}, KEY, workload.data)
        for name, curve in one.metrics.items():
            np.testing.assert_allclose(together.metrics[name][i], curve, rtol=2e-5, err_msg=name)


def test_a_reference_loop_in_plain_optax_agrees():
    workload = tiny.mlp()
    result = run(workload, lambda p: optax.sgd(p["learning_rate"], 0.9), num_steps=6, keep="final")
    params, state = workload.init(jax.random.fold_in(KEY, 0))
    tx = optax.sgd(0.1, 0.9)
    opt_state = tx.init(params)
    for step in range(6):
        batch = workload.batch(workload.data, jax.random.fold_in(KEY, 1), step)
        grads = jax.grad(lambda p, batch=batch: workload.loss(p, state, batch, KEY)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("maximize", [False, True])
def test_best_weights_are_those_of_the_best_evaluation(maximize):
    # The objective falls until step 4 and rises again: w walks 0, 1, ..., 8.
    sign = -1.0 if maximize else 1.0
    workload = pbx.Workload(
        name="walk",
        init=lambda key: ({"w": jnp.zeros(())}, {"seen": jnp.zeros(())}),
        loss=lambda p, s, b, k: (-p["w"], ({"seen": s["seen"] + 1.0}, {})),
        batch=lambda d, k, i: (),
        evaluate=lambda p, s, d: {"score": sign * (p["w"] - 4.0) ** 2},
        objective="score",
        maximize=maximize,
    )
    result = run(workload, num_steps=8, eval_every=2, lr=1.0, keep="best")
    assert (float(result.best_value), int(result.best_step)) == (0.0, 4)
    assert float(result.params["w"]) == float(result.model_state["seen"]) == 4.0
    assert float(run(workload, num_steps=8, lr=1.0, keep="final").params["w"]) == 8.0
    assert run(workload, num_steps=8, lr=1.0).params is None


def test_ties_go_to_the_latest_evaluation():
    workload = custom(lambda p, i: jnp.sum(p["w"] * 0.0) + 1.0)
    result = run(workload, keep="best")
    assert int(result.best_step) == int(result.step[-1])


@pytest.mark.parametrize("maximize", [False, True])
def test_ties_go_to_the_lowest_loss_before_the_latest_evaluation(maximize):
    # The weights fall by 0.1 a step from 1 on; they pass 0.5 at step 5, and nothing else does.
    sign = 1.0 if maximize else -1.0

    def evaluate(params, state, data):
        near = jnp.abs(params["w"].mean() - 0.5)
        return {
            "valid/accuracy": sign * jnp.where(near < 0.35, 1.0, 0.0),
            "valid/loss": jnp.where(near < 0.25, 0.0, 1.0),
            "train/loss": near,
        }

    workload = dataclasses.replace(
        custom(lambda p, i: jnp.sum(p["w"])),
        evaluate=evaluate,
        objective="valid/accuracy",
        maximize=maximize,
    )
    result = run(workload, keep="best", eval_every=1)
    np.testing.assert_allclose(result.params["w"], 0.5, rtol=1e-5)
    assert int(result.best_step) == 5
    # Without the training loss the latest of the equal ones, within 0.25 of 0.5, is best.
    without = dataclasses.replace(
        workload, evaluate=lambda *a: {k: v for k, v in evaluate(*a).items() if k[:5] != "train"}
    )
    assert int(run(without, eval_every=1).best_step) == 7


def test_nonfinite_loss_freezes_before_the_update():
    workload = custom(lambda p, i: jnp.sum(p["w"]) + jnp.where(i == 5, jnp.nan, 0.0))
    result = run(workload, keep="final")
    assert bool(result.infeasible)
    assert (int(result.infeasible_step), reason(result)) == (5, "nonfinite_loss")
    assert np.isfinite(result.metrics["valid/loss"]).tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(result.params["w"], 1 - 0.1 * 5, rtol=1e-6)
    assert int(result.norms.num_steps) == 6  # the bad step is in the record, those after are not


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])  # 45
def test_every_nonfinite_loss_is_divergence(value):
    workload = custom(lambda p, i: jnp.sum(p["w"]) + jnp.where(i == 2, value, 0.0))
    result = run(workload)
    assert (int(result.infeasible_step), reason(result)) == (2, "nonfinite_loss")
    assert np.isfinite(result.best_value)


def test_nonfinite_parameters_freeze_at_the_update_that_made_them():
    def make_optimizer(point):
        return optax.scale_by_schedule(
            lambda count: jnp.where(count == 3, jnp.inf, -point["learning_rate"])
        )

    result = run(custom(lambda p, i: jnp.sum(p["w"])), make_optimizer, keep="final")
    assert (int(result.infeasible_step), reason(result)) == (3, "nonfinite_params")
    np.testing.assert_allclose(result.params["w"], 1 - 0.1 * 3, rtol=1e-6)


def test_nan_first_is_never_selected():  # 44
    workload = custom(
        lambda p, i: jnp.sum(p["w"]),
        evaluate=lambda p, s, d: {
            "valid/loss": jnp.where(
                p["w"][0] > 0.9, jnp.nan, jnp.where(p["w"][0] > 0.7, -jnp.inf, p["w"][0])
            )
        },
    )
    result = run(workload)
    assert (int(result.best_step), bool(result.infeasible)) == (8, False)


def test_divergence_of_one_changes_no_bit_of_another():  # 42
    workload = tiny.mlp()
    sweep = jax.jit(
        jax.vmap(pbx.make_train(workload, tiny.momentum, 12, 4, keep="best"), (0, None, None))
    )

    def with_neighbour(lr):
        points = {"learning_rate": jnp.array([0.1, lr, 0.05], jnp.float32)}
        return sweep(points, KEY, workload.data)

    calm, wild = with_neighbour(0.2), with_neighbour(1e30)
    assert bool(wild.infeasible[1])
    assert not bool(calm.infeasible[1])
    for i in (0, 2):
        assert same_bits(*(jax.tree.map(lambda a, i=i: a[i], r) for r in (calm, wild)))


def test_high_loss_never_stops_training():
    workload = tiny.mlp()
    result = run(workload, tiny.momentum, num_steps=40, eval_every=10, lr=3.0)
    assert reason(result) == "high_loss"
    assert int(result.infeasible_step) == 9
    assert np.isfinite(result.metrics["train/loss"]).all()
    slow = run(workload, tiny.momentum, num_steps=40, eval_every=10, lr=1e-9)
    assert not bool(slow.infeasible)


def test_schedules_reach_the_optimizer_as_learning_rate():
    seen = []

    def make_optimizer(point):
        seen.append(point["learning_rate"])
        return pbx.sgd(point["learning_rate"])

    workload = custom(lambda p, i: jnp.sum(p["w"]))
    result = run(
        workload,
        make_optimizer,
        num_steps=10,
        make_schedule=lambda p, n: pbx.schedules.linear_decay(p["learning_rate"], n),
        keep="final",
    )
    assert callable(seen[0])
    np.testing.assert_allclose(
        result.params["w"], 1 - 0.1 * sum(1 - i / 10 for i in range(10)), rtol=1e-5
    )


def test_value_reaches_transforms_that_ask_for_it():
    def make_optimizer(point):
        return optax.chain(
            optax.sgd(point["learning_rate"]), optax.contrib.reduce_on_plateau(patience=2)
        )

    assert np.isfinite(run(tiny.quadratic(), make_optimizer).best_value)


def test_a_workload_may_be_a_function_of_the_point():
    def workload(point):
        return custom(lambda p, i: jnp.sum(p["w"]) * point["slope"])

    train = jax.jit(pbx.make_train(workload, tiny.sgd, 4, 4, keep="final"))
    result = train({"learning_rate": 0.1, "slope": 2.0}, KEY, None)
    np.testing.assert_allclose(result.params["w"], 1 - 0.1 * 4 * 2, rtol=1e-6)


def test_none_and_zero_size_leaves_work():  # 27, 28
    init = lambda key: ({"w": jnp.ones(2), "none": None, "empty": jnp.zeros((0, 3))}, {})  # noqa: E731
    result = run(custom(lambda p, i: jnp.sum(p["w"]), init=init), pbx_adam, keep="best")
    assert result.params["none"] is None
    assert result.params["empty"].shape == (0, 3)


def pbx_adam(point):
    return pbx.adam(point["learning_rate"])


def test_low_precision_params_warn_and_train():  # 50, 51
    init = lambda key: ({"w": jnp.ones(2, jnp.bfloat16)}, {})  # noqa: E731
    with pytest.warns(UserWarning, match="bfloat16.*rounding"):
        result = run(custom(lambda p, i: jnp.sum(p["w"]), init=init), pbx_adam, keep="final")
    assert result.params["w"].dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(result.params["w"], np.float32)).all()


def test_optax_state_that_changes_dtype_is_explained():
    init = lambda key: ({"w": jnp.ones(2, jnp.bfloat16)}, {})  # noqa: E731
    workload = custom(lambda p, i: jnp.sum(p["w"]), init=init)
    with (
        pytest.warns(UserWarning, match="rounding"),
        pytest.raises(ValueError, match=r"optimizer's state changed at .*bfloat16"),
    ):
        run(workload, lambda p: optax.sgd(0.1, momentum=p["learning_rate"]))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, i: p["w"], r"loss must be a scalar, got shape \(2,\)"),  # 15
        (lambda p, i: None, "loss must be a real scalar array, got NoneType"),  # 16
        (lambda p, i: jnp.int32(1), "loss must be floating point, got dtype int32"),  # 16
        (lambda p, i: jnp.bool_(True), "loss must be floating point, got dtype bool"),  # 16
        (lambda p, i: jnp.sum(p["w"]) * 1j, "loss must be real, got dtype complex64"),  # 16
        (lambda p, i: np.sum(p["w"]) + np.asarray(p["w"]).sum(), "use jnp"),  # 18
        (lambda p, i: jnp.sum(p["w"]) if p["w"][0] > 0 else 0.0, r"jnp\.where"),  # 19
        (lambda p, i: jnp.ones(int(p["w"][0])).sum(), "Shapes and structure"),
    ],
)
def test_bad_losses(loss, message):
    with pytest.raises(ValueError, match=message):
        run(custom(loss))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda v: v, "an array of shape"),  # 17
        (lambda v: (v, {}), "with a dict of metrics"),
        (lambda v: (v, ({}, {}), 1), "a tuple of 3"),
        (lambda v: (v, ({"new": v}, {})), "model state changed its structure"),
        (lambda v: (v, ({}, {"m": jnp.ones(3)})), r"metric 'm' must be a scalar, got shape \(3,\)"),
        (lambda v: (v, ({}, {"loss": v})), "recorded already"),
    ],
)
def test_broken_promises(out, message):
    workload = custom(lambda p, i: jnp.sum(p["w"]))
    workload = pbx.Workload(**{**vars(workload), "loss": lambda p, s, b, k: out(jnp.sum(p["w"]))})
    with pytest.raises(ValueError, match=message):
        run(workload)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda key: ({}, {}), "empty params"),  # 24
        (lambda key: ({"w": jnp.ones(2), "name": "x"}, {}), "leaf 'name' is not an array"),  # 25
        (
            lambda key: ({"w": jnp.ones(2), "n": jnp.arange(3)}, {}),
            "leaf 'n' has dtype int32.*mask",  # 26
        ),
        (lambda key: {"w": jnp.ones(2)}, r"pair \(params, model_state\)"),
        (
            lambda key: ({"w": jnp.ones(int(jax.random.randint(key, (), 1, 3)))}, {}),
            "not depend on the key",  # 29
        ),
        (
            lambda key: ({"w": jnp.ones((jax.random.randint(key, (), 1, 3), 2))}, {}),
            "not depend on the key",
        ),
    ],
)
def test_bad_inits(init, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        run(custom(lambda p, i: jnp.sum(p["w"]), init=init))


@pytest.mark.parametrize("shape", [lambda n: n, lambda n: (n, 3), lambda n: int(n)])
def test_shapes_that_vary_with_the_point_are_explained(shape):  # 29
    def workload(point):
        init = lambda key: ({"w": jnp.ones(shape(point["width"]))}, {})  # noqa: E731
        return custom(lambda p, i: jnp.sum(p["w"]), init=init)

    train = pbx.make_train(workload, tiny.sgd, 4, 2)
    with pytest.raises(ValueError, match="may not depend on the key or the point"):
        jax.jit(train)({"learning_rate": 0.1, "width": jnp.int32(3)}, KEY, None)


def test_gradient_of_another_shape_is_named():  # 30
    broadcast = optax.stateless(lambda u, p: jax.tree.map(lambda x: x[None], u))
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(1, 2\)"):
        run(custom(lambda p, i: jnp.sum(p["w"])), lambda p: broadcast)


@pytest.mark.parametrize(
    "loss",
    [lambda p, i: i * 1.0, lambda p, i: jnp.sum(jax.lax.stop_gradient(p["w"]))],
    ids=["ignored", "stopped"],
)
def test_loss_without_params_warns(loss):  # 20
    with pytest.warns(UserWarning, match="does not depend on the params"):
        run(custom(loss))


def test_the_users_own_error_passes_through():  # 22
    def loss(p, i):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(custom(loss))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps"),  # 8
        ({"num_steps": 2**31}, "num_steps"),  # 10
        ({"num_steps": 1.5}, "num_steps"),
        ({"eval_every": 0}, "eval_every"),
        ({"eval_every": True}, "eval_every"),
        ({"keep": "bset"}, "did you mean 'best'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pbx.make_train(tiny.quadratic(), tiny.sgd, **{"num_steps": 4, "eval_every": 2, **arguments})


def test_unknown_names_suggest_the_nearest():  # 5
    with pytest.raises(TypeError, match="did you mean 'eval_every'"):
        pbx.make_trial(tiny.quadratic(), tiny.sgd, num_steps=4, evaluate_every=2)
    with pytest.raises(KeyError, match="did you mean 'learning_rate'"):
        run(tiny.quadratic(), lambda p: pbx.sgd(p["lerning_rate"]))
    wrong = pbx.Workload(**{**vars(tiny.quadratic()), "objective": "valid/los"})
    with pytest.raises(ValueError, match="did you mean 'valid/loss'"):
        run(wrong)
    with pytest.raises(TypeError, match="GradientTransformation"):
        run(tiny.quadratic(), lambda p: p["learning_rate"])
    with pytest.raises(ValueError, match=r"pbx\.Workload"):
        pbx.make_train("digits", tiny.sgd, 4, 2)


def test_trial_keys():
    keys = [pbx.trial_key(KEY, s, t) for s in (0, 1) for t in (None, 0, 1)]
    data = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    assert len(data) == 6
    raw = jax.random.PRNGKey(0)
    assert np.array_equal(pbx.trial_key(raw, 1), jax.random.key_data(pbx.trial_key(KEY, 1)))
    with pytest.raises(ValueError, match="key must be one random key"):
        pbx.trial_key(0)


def clipped(point):
    return optax.chain(
        pbx.monitor_norms(), pbx.clip_by_global_norm(point["max_norm"]), tiny.sgd(point)
    )


@pytest.mark.slow
def test_norms_and_peaks_between_evaluations_are_recorded():
    points = {"learning_rate": jnp.float32([0.1, 0.1]), "max_norm": jnp.float32([0.5, 1e30])}
    one, whole = (
        jax.jit(jax.vmap(pbx.make_train(tiny.mlp(), clipped, 12, every), in_axes=(0, None, None)))(
            points, jax.random.key(0), tiny.mlp().data
        )
        for every in (1, 5)
    )
    loss, norm = (
        np.asarray(one.metrics[f"step/{n}"], np.float64) for n in ("loss", "gradient_norm")
    )
    smooth = [loss[:, 1]]
    for step in range(2, 13):
        smooth.append(0.9 * smooth[-1] + 0.1 * loss[:, step])
    smooth = np.stack(smooth, axis=1)
    for index, (start, stop) in enumerate(((0, 5), (5, 10), (10, 12)), start=1):
        span = slice(start + 1, stop + 1)
        for name, want in (
            ("step/gradient_norm", norm[:, span].mean(axis=1)),
            ("step/peak_gradient_norm", norm[:, span].max(axis=1)),
            ("step/peak_loss", smooth[:, start:stop].max(axis=1)),
        ):
            np.testing.assert_allclose(whole.metrics[name][:, index], want, rtol=1e-4)
    assert np.isnan(whole.metrics["step/peak_gradient_norm"][:, 0]).all()
    np.testing.assert_array_equal(whole.metrics["step/peak_loss"][:, 0], np.float32(loss[:, 1]))
    # The clipper's count and threshold, beside a monitor that never clips.
    assert whole.norms.threshold.tolist() == [0.5, np.float32(1e30)]
    assert whole.norms.num_clipped.tolist() == [int((norm[0, 1:] > 0.5).sum()), 0]
    assert 0 < int(whole.norms.num_clipped[0]) <= 12


def test_the_names_of_our_own_records_are_taken():
    def loss(params, state, batch, key):
        return jnp.sum(params["w"] ** 2), (state, {"peak_loss": jnp.float32(0)})

    workload = dataclasses.replace(tiny.quadratic(), loss=loss)
    train = pbx.make_train(workload, tiny.sgd, 2, 1)
    with pytest.raises(ValueError, match="may not be called 'peak_loss'"):
        train({"learning_rate": 0.1}, jax.random.key(0), workload.data)


def test_float64_trains_in_float64_and_records_in_float32():
    jax.config.update("jax_enable_x64", True)
    try:
        train = pbx.make_train(tiny.quadratic(), tiny.sgd, 3, 1)
        result = train({"learning_rate": 1e-3}, jax.random.key(0), np.asarray([1e3, 1.0]))
        losses = np.asarray(result.metrics["valid/loss"])
        assert losses.dtype == np.float64
        # w0 is solved by one step of 1 / curvature, w1 shrinks by 0.999.
        np.testing.assert_allclose(losses[2:] / losses[1:-1], 0.999**2, rtol=1e-12)
        assert result.metrics["step/peak_loss"].dtype == jnp.float32
        assert not result.infeasible
    finally:
        jax.config.update("jax_enable_x64", False)
