"""The programs that recipes are written as: they run, and reach what the recipe promises."""

import dataclasses
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_workloads as tiny

import playbook_optax as pbx
from playbook_optax import search_spaces, zoo
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import program, tune
from playbook_optax.procedures.verdict import Verdict

KEY = jax.random.key(0)
STEPS = 12
# What a user's own module may hold.
MODULE = """
import dataclasses

import optax
import tiny_workloads as tiny

import playbook_optax as pbx

work = tiny.noisy_quadratic()
score = dataclasses.replace(
    work,
    evaluate=lambda p, s, d: {"valid/score": -work.evaluate(p, s, d)["valid/loss"]},
    objective="valid/score",
    maximize=True,
)


def scaled(point):
    def loss(params, state, batch, key):
        value, rest = work.loss(params, state, batch, key)
        return point["scale"] * value, rest

    return dataclasses.replace(work, loss=loss)


def own_optimizer(point):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(point["learning_rate"], point["b1"]),
        pbx.reduce_on_plateau(patience=3),
    )


def own_schedule(point, num_steps):
    return lambda count: point["learning_rate"] / (1.0 + count / num_steps)
"""
OPTIMIZERS = {
    "sgd": {},
    "momentum": {},
    "nesterov": {"momentum": 0.75},
    "rmsprop": {"decay": 0.8},
    "rmsprop_momentum": {"momentum": 0.5, "eps": 0.01},
    "adam": {"b1": 0.8},
    "adam_eps": {"b1": 0.8, "b2": 0.99, "eps": 0.1},
    "adamw": {"weight_decay": 0.25},
    "adamw_eps": {"weight_decay": 0.25, "eps": 1e-3},
}
of = pbx.schedules
SCHEDULES = {
    "constant": lambda rate, steps: of.constant(rate),
    "linear": lambda rate, steps: of.linear_decay(rate, steps - 3, 3, 0.01),
    "linear_extended": lambda rate, steps: of.extend_for_longer_run(of.linear_decay(rate, 4), 3),
    "cosine": lambda rate, steps: of.cosine_decay(rate, steps),
    "cosine_held": lambda rate, steps: of.cosine_decay(rate, steps - 4, 4, 0.02),
    "polynomial": lambda rate, steps: of.polynomial_decay(rate, steps - 2, 2, 0.01, power=2.0),
    "exponential": lambda rate, steps: of.exponential_decay(rate, 5, 0.5, 1, 0.04),
    "no_exponential": lambda rate, steps: of.exponential_decay(rate, 5, 1.0, 1, 0.04),
    "piecewise": lambda rate, steps: of.piecewise_constant([rate, 0.0, rate / 2], [3, 6]),
    "drop": lambda rate, steps: of.cosine_decay(rate, 0, 5, 0.01),
    "warmed_up": lambda rate, steps: of.prepend_warmup(of.constant(rate), 3),
}


def recipe_of(
    workload, point, name=None, make_optimizer=tiny.sgd, seeds=2, chapters=(), **pipeline
):
    """A recipe without evidence: two seeds, whose values are not looked at."""
    found = {"make_schedule": tune.cosine, **pipeline}
    work = workload if isinstance(workload, pbx.Workload) else workload(point)
    return tune.Recipe(
        workload=workload,
        pipeline=tune.Pipeline(make_optimizer, **found),
        optimizer_name=name,
        point=point,
        num_steps=STEPS,
        eval_every=4,
        objective=work.objective,
        maximize=work.maximize,
        values=np.linspace(0.5, 0.25, seeds),
        chapters=chapters,
        total_budget=100,
        params=None,
        model_state=None,
        key=KEY,
    )


def by_name(label):
    """A recipe of one of our optimizers, `OPTIMIZERS`."""
    point = {"learning_rate": 0.125, **OPTIMIZERS[label]}
    return recipe_of(tiny.noisy_quadratic(), point, label.partition("_")[0])


def with_schedule(label):
    """A recipe with a schedule, behind a warm-up and a clipper."""

    def make_schedule(point, num_steps):
        return SCHEDULES[label](point["learning_rate"], num_steps)

    pipeline = {"make_schedule": make_schedule, "warmup_steps": 2, "max_norm": 1.5}
    return recipe_of(tiny.noisy_quadratic(), {"learning_rate": 0.25}, "sgd", **pipeline)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A user's module on the path, and its folder."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "users_parts.py").write_text(MODULE)
    sys.path.append(str(folder))
    import users_parts

    yield users_parts
    sys.path.remove(str(folder))
    del sys.modules["users_parts"]


DRIVER = """
import contextlib, io, json, pathlib, runpy, sys

import jax
import numpy as np

told = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            names = runpy.run_path(str(path))
        weights = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(names["best_params"][0])]
        values = names.get("values")
        told[path.stem] = {"out": out.getvalue(), "weights": weights, "values": values}
    except Exception as error:
        told[path.stem] = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(told))
"""


def run(folder, *arguments):
    """What Python says of a file; of the user's module it knows what the program tells it."""
    places = [pathlib.Path(pbx.__file__).parents[1], pathlib.Path(tiny.__file__).parent]
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        check=False,
    )


@pytest.fixture(scope="module")
def ran(module, tmp_path_factory):
    """Name of a program to what it did, all of them in one process of their own."""
    where = "tiny_workloads:noisy_quadratic"
    sources = {}
    for label in OPTIMIZERS:
        for style in program.STYLES:
            sources[f"{label}-{style}"] = by_name(label).to_python(where, style=style)
    for label in SCHEDULES:
        for style in program.STYLES:
            sources[f"{label}-{style}"] = with_schedule(label).to_python(where, style=style)
    point = {"learning_rate": 0.125, "b1": 0.75, "scale": 0.5}
    own = recipe_of(
        module.scaled, point, None, module.own_optimizer, make_schedule=module.own_schedule
    )
    wine = recipe_of(zoo.wine(), {"learning_rate": 0.125}, "momentum", seeds=1)
    score = recipe_of(module.score, {"learning_rate": 0.25}, "sgd")
    for style in program.STYLES:
        sources[f"own-{style}"] = own.to_python(style=style)
        sources[f"zoo-{style}"] = wine.to_python(style=style)
        sources[f"score-{style}"] = score.to_python(style=style)
    folder = tmp_path_factory.mktemp("programs")
    (folder / "driver").write_text(DRIVER)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    done = run(folder, "driver", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), sources


def values_of(told, num=2):
    """The value of each seed that a program printed, if what it says of all is right."""
    lines = told["out"].splitlines()
    assert len(lines) == num + (num > 1)
    values = [float(re.fullmatch(r"best \S+ (\S+) at step \d+", line)[1]) for line in lines[:num]]
    if num > 1:
        said = re.fullmatch(r"mean (\S+), standard deviation (\S+)", lines[-1])
        told_of_all = [float(text) for text in said.groups()]
        assert told_of_all == pytest.approx([np.mean(values), np.std(values, ddof=1)], rel=1e-4)
        assert told["values"] == pytest.approx(values, rel=1e-5)
    return values


@pytest.mark.parametrize("label", [*OPTIMIZERS, *SCHEDULES, "own", "zoo", "score"])
def test_plain_optax_trains_what_ours_trains(ran, label):
    told, sources = ran
    ours, plain = (told[f"{label}-{style}"] for style in program.STYLES)
    num = 1 if label == "zoo" else 2
    assert values_of(plain, num) == pytest.approx(values_of(ours, num), rel=1e-4)
    for one, other in zip(ours["weights"], plain["weights"], strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    # Without our package, but for the zoo's own workload.
    source = sources[f"{label}-optax"]
    assert "pbx" not in source
    assert source.count("playbook_optax") == (label == "zoo")
    assert "pbx.trial_key" in sources[f"{label}-playbook_optax"]
    # As long as it takes, and no longer.
    lines = [line.strip() for line in source.splitlines()]
    assert len([line for line in lines if line and not line.startswith(("#", "import"))]) <= 38


@pytest.mark.parametrize("label", ["own", "score"])
def test_the_program_trains_what_the_engine_trains(ran, module, label):
    """A function of the point, an optimizer of the user's that asks for the loss, and a maximum."""
    told, _ = ran
    if label == "own":
        point = {"learning_rate": 0.125, "b1": 0.75, "scale": 0.5}
        work, make, schedule = module.scaled, module.own_optimizer, module.own_schedule
    else:
        point, work, make, schedule = {"learning_rate": 0.25}, module.score, tiny.sgd, tune.cosine
    train = pbx.make_train(work, make, STEPS, 4, make_schedule=schedule)
    data = tiny.noisy_quadratic().data
    reached = [
        float(jax.jit(train)(point, pbx.trial_key(KEY, seed), data).best_value) for seed in (0, 1)
    ]
    assert values_of(told[f"{label}-playbook_optax"]) == pytest.approx(reached, rel=1e-5)
    assert reached[0] != reached[1]


def test_a_schedule_is_written_with_its_numbers_in_both_styles():
    ours, plain = (
        with_schedule("cosine_held").to_python(style=style).splitlines() for style in program.STYLES
    )
    made = "pbx.schedules.cosine_decay(0.25, 6, hold_steps=4, end_value=0.02)"
    assert f"schedule = pbx.schedules.prepend_warmup({made}, 2)" in ours
    held = "optax.join_schedules([optax.constant_schedule(0.25), "
    held += "optax.cosine_decay_schedule(0.25, 6, alpha=0.08)], [4])"
    rise = "optax.linear_schedule(0.0, 0.25, 2)"
    assert f"schedule = optax.join_schedules([{rise}, {held}], [2])" in plain
    assert "optimizer = optax.chain(optax.clip_by_global_norm(1.5), optax.sgd(schedule))" in plain


def test_every_optimizer_of_ours_is_written_or_refused_by_its_name():
    written = {label.partition("_")[0] for label in OPTIMIZERS}
    refused = set(search_spaces.TABLE) - written
    assert refused == {"nadam", "nadamw"}
    for name in refused:
        recipe = recipe_of(tiny.quadratic(), {"learning_rate": 0.1}, name)
        assert f"pbx.{name}(" in recipe.to_python()
        with pytest.raises(ValueError, match=f"^{name} has no equal in Optax: .*22%"):
            recipe.to_python(style="optax")


def test_what_is_left_out_of_a_program_in_optax_is_the_same_in_both():
    for name in ("adam", "adamw", "rmsprop"):
        taken = tune.optimizer_arguments(name)
        theirs = inspect.signature(getattr(optax, name)).parameters
        for argument in set(taken) - {"learning_rate", "momentum"}:
            assert theirs[argument].default == taken[argument]


def test_the_comment_says_how_much_adam_differs():
    source = by_name("adam").to_python(style="optax")
    # 1e-8 / sqrt(1 - 0.999).
    assert "eps / sqrt(1 - b2**t), 3.2e-07 at first" in source
    assert "optimizer = optax.adam(schedule, b1=0.8)" in source
    assert "optax.inject_hyperparams(optax.adam, " in by_name("adam_eps").to_python(style="optax")
    initial = by_name("rmsprop").to_python(style="optax")
    assert "initial_scale=1.0" in initial
    assert "starts at 1, as in the playbook" in initial


def test_pieces_that_optax_lacks_are_refused_by_name():
    point = {"learning_rate": 0.5}

    def refused(match, **pipeline):
        recipe = recipe_of(tiny.quadratic(), point, "sgd", **pipeline)
        assert "schedule = pbx.schedules." in recipe.to_python()
        with pytest.raises(ValueError, match=match):
            recipe.to_python(style="optax")

    slow = lambda point, steps: of.inverse_sqrt_decay(point["learning_rate"], steps)  # noqa: E731
    refused("^inverse_sqrt_decay has no equal in Optax", make_schedule=slow)
    rise = lambda point, steps: of.cosine_decay(0.0, steps, end_value=1.0)  # noqa: E731
    refused("^cosine_decay has no equal in Optax", make_schedule=rise)
    base = tiny.quadratic()
    half = dataclasses.replace(base, init=lambda key: ({"w": jnp.ones(2, jnp.bfloat16)}, {}))
    recipe = recipe_of(half, point, "momentum")
    with pytest.raises(ValueError, match=r"^an optimizer of bfloat16 parameters has no equal"):
        recipe.to_python(style="optax")


@pytest.mark.parametrize("style", ["Optax", "torch", None, ""])
def test_an_unknown_style_is_refused(style):
    with pytest.raises(ValueError, match=r"style = .* is unknown"):
        by_name("sgd").to_python(style=style)


def test_a_stub_fails_with_the_sentence_that_says_what_to_fill_in(tmp_path):
    point = {"learning_rate": 0.25, "b1": 0.5, "scale": 2.0}
    # What is defined in here no program can import.
    work = tiny.noisy_quadratic()
    recipe = recipe_of(
        lambda point: work,
        point,
        None,
        lambda point: optax.sgd(point["learning_rate"], point["b1"]),
        make_schedule=lambda point, num_steps: lambda count: point["learning_rate"],
    )
    sources = {style: recipe.to_python(style=style) for style in program.STYLES}
    names = ("workload", "make_schedule", "make_optimizer")
    for source in sources.values():
        assert "# No module holds your workload. Fill in these two lines:\n" in source
        for name in names:
            called = "({'learning_rate': 0.25, 'b1': 0.5, 'scale': 2.0})" * (name == "workload")
            two = f"# from your_module import your_{name}\n# {name} = your_{name}{called}\nif "
            assert two in source
    path = tmp_path / "recipe.py"
    path.write_text(sources["optax"])
    done = run(tmp_path, path)
    assert done.returncode == 1
    assert done.stdout == ""
    sentence = (
        "RuntimeError: This program does not know your {}: fill in the two lines of it that are "
        "'from your_module import your_{}' and '{} = your_{}{}'."
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == sentence.format(*["workload"] * 4, "(...)")
    # Filled in, they are what the program trains.
    filled = re.sub(r"(?m)^# ((from your_module|\w+ = your_).*)$", r"\1", sources["optax"])
    path.write_text(filled)
    users = "import optax\nfrom tiny_workloads import noisy_quadratic\n"
    users += "your_workload = lambda point: noisy_quadratic()\n"
    users += "your_make_schedule = lambda p, steps: lambda count: p['learning_rate']\n"
    users += "your_make_optimizer = lambda p: optax.sgd(p['learning_rate'], p['b1'])\n"
    (tmp_path / "your_module.py").write_text(users)
    done = run(tmp_path, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best valid/loss ") == 2
    # One that is missing is the one that is named.
    (tmp_path / "your_module.py").write_text("your_workload = None\n")
    partly = sources["optax"].replace("# from your_module import your_workload\n# ", "", 1)
    path.write_text(partly.replace("workload = your_workload(", "workload = dict(", 1))
    assert run(tmp_path, path).stderr.strip().splitlines()[-1] == sentence.format(
        *["make_schedule"] * 4, ""
    )


def test_what_a_script_holds_is_not_imported_from_it(monkeypatch):
    work = tiny.quadratic()
    monkeypatch.setattr(sys.modules["__main__"], "held_by_a_script", work, raising=False)
    source = recipe_of(work, {"learning_rate": 0.5}, "sgd").to_python()
    said = " ".join(line.removeprefix("# ") for line in source.splitlines())
    assert "held by the script or notebook that tuned it, which would run again" in said
    assert "held_by_a_script" not in source
    assert "if 'workload' not in globals():" in source


def test_the_program_beside_a_study_runs_from_anywhere(module, tmp_path):
    recipe = pbx.tune(
        module.work,
        "sgd",
        num_trials=3,
        num_steps=8,
        key=KEY,
        directory=tmp_path / "study",
        overrides={"point": {"learning_rate": 0.25}},
        progress=False,
    )
    assert len(recipe.values) == 3
    (tmp_path / "elsewhere").mkdir()
    done = run(tmp_path / "elsewhere", tmp_path / "study" / "recipe.py")
    assert done.returncode == 0, done.stderr
    *each, last = done.stdout.splitlines()
    values = [float(line.split()[2]) for line in each]
    assert values == pytest.approx(recipe.values, rel=1e-5)
    mean, spread = re.search(r"mean (\S+), standard deviation (\S+)", last).groups()
    assert float(mean) == pytest.approx(recipe.value, rel=1e-5)
    assert float(spread) == pytest.approx(recipe.spread, rel=1e-4)


def test_an_installed_module_needs_no_folder(module):
    assert program._folder("users_parts") == str(pathlib.Path(module.__file__).parent)
    assert program._folder("optax") is None
    assert program._folder("json.decoder") is None
    assert program._folder("sys") is None
    assert program._folder("no_such_module") is None


def test_a_changed_workload_of_the_zoo_is_none_of_it():
    wine = zoo.wine()
    recipe = recipe_of(wine, {"learning_rate": 0.1}, "sgd")
    assert "zoo.load('wine')" in recipe.to_python()
    other = dataclasses.replace(wine, loss=lambda p, s, b, k: wine.loss(p, s, b, k))
    assert "zoo.load" not in recipe_of(other, {"learning_rate": 0.1}, "sgd").to_python()


def test_what_there_is_against_a_recipe_stands_above_its_program():
    def finding(code, severity):
        return Finding(code, severity, f"Said by {code}.", {}, "A section")

    decided = finding("decided_retrain", "warning")
    seen = [finding("best_at_start", "error"), finding("still_improving", "warning")]
    tied = finding("validation_cannot_separate", "warning")
    earlier = [
        finding("no_slope", "error"),
        dataclasses.replace(tied, message="Said before."),
        tied,
    ]
    chapters = tuple(
        tune.Chapter(name, decision, Verdict(None, tuple(findings), {"study": None}, 0))
        for name, decision, findings in (
            (tune.LEARNING_RATE_CHAPTER, finding("decided_rate", "info"), earlier),
            (tune.RETRAIN, decided, seen),
        )
    )
    recipe = recipe_of(tiny.quadratic(), {"learning_rate": 0.1}, "sgd")
    # Neither what only an earlier study said of its own best, nor what concerns no answer.
    first = dataclasses.replace(recipe, chapters=chapters[:1])
    assert program.against(first) == [earlier[0], tied]
    both = dataclasses.replace(recipe, chapters=chapters)
    assert program.against(both) == [seen[0], decided, tied]
    chapters = (tune.Chapter(tune.RETRAIN, decided, Verdict(None, tuple(seen), {}, 0)),)
    recipe = dataclasses.replace(recipe, chapters=chapters)
    assert program.against(recipe) == [seen[0], decided]
    head = recipe.to_python().splitlines()
    assert head[0].startswith("# quadratic, not tuned: valid/loss = 0.375 (standard deviation")
    assert head[2:4] == ["# error: Said by best_at_start.", "# warning: Said by decided_retrain."]
