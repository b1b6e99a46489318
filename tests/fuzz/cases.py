"""One case of the fuzzer: a small stored record, changed, and everything that reads it behind it.

A case is a right result or our own error. Anything else fails: another exception, a warning, a
message that is not ours, more than a few seconds, or memory that has nothing to do with the files.
"""

import contextlib
import copy
import dataclasses
import dis
import io
import json
import os
import random
import shutil
import signal
import time
import traceback
import types
import warnings
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pandas

import playbook_optax as pbx
from playbook_optax import _checks, chapters, cli, report, tuning
from playbook_optax._ties import tie_breakers
from playbook_optax.analysis.findings import Finding
from playbook_optax.procedures import tune, tuned
from playbook_optax.procedures.remedies import RemedyComparison, RemedyRow
from playbook_optax.procedures.stability import Stabilization
from playbook_optax.procedures.verdict import Verdict
from playbook_optax.procedures.warmup import WarmupAnswer
from playbook_optax.records import storage, weights
from playbook_optax.runner import finished, plan, resume
from playbook_optax.search_space import Categorical, Float, Integer, SearchSpace
from playbook_optax.trials import keys
from tests.fuzz import nasty

MAX_SECONDS = 5.0
MAX_BYTES = 2**30
FIXTURE = Path(__file__).parents[1] / "records" / "fixtures" / "study_v1"
PACKAGE = Path(pbx.__file__).parent

STEP = [0, 10, 20, 30]
SPACE = SearchSpace(
    {
        "learning_rate": Float(1e-4, 1.0, scale="log"),
        "b1": Float(0.5, 0.99, scale="reverse_log"),
        "warmup_steps": Integer(1, 100, scale="log", include_zero=True),
        "decay": Categorical(["cosine", "linear", "none"]),
        "batch_size": Categorical([16, 32, 64]),
    }
)


class Failed(AssertionError):  # noqa: N818
    """A case that ended as it must not."""


# What is changed ----------------------------------------------------------------------------------


def _curves(rng, num_trials, num_seeds=1):
    start = rng.uniform(1, 3, (num_trials, num_seeds, 1))
    falls = rng.uniform(0, 1, (num_trials, num_seeds, 1))
    curves = start * np.exp(-falls * np.arange(len(STEP))) + 0.01 * rng.random((num_trials, 1, 4))
    curves[-1, :, 2:] = np.nan
    return curves.astype(np.float32)


def _points(rng, num_trials):
    return {
        "learning_rate": (10 ** rng.uniform(-4, 0, num_trials)).astype(np.float32),
        "b1": (1 - 10 ** rng.uniform(-2, -0.31, num_trials)).astype(np.float32),
        "warmup_steps": rng.integers(0, 100, num_trials, np.int32),
        "decay": rng.integers(0, 3, num_trials, np.int32),
        "batch_size": rng.choice(np.int32([16, 32, 64]), num_trials),
    }


def imported_study(num_trials=18, num_seeds=1):
    rng = np.random.default_rng(num_trials)
    curves = _curves(rng, num_trials, num_seeds)
    metrics = {"train/loss": curves, "valid/loss": curves * 1.25}
    return pbx.Study.from_arrays(
        _points(rng, num_trials), metrics, STEP, objective="valid/loss", space=SPACE
    )


def a_frame(num_trials=14):
    rng = np.random.default_rng(0)
    rows = []
    for trial in range(num_trials):
        curve = _curves(rng, 1)[0, 0]
        rate = 10 ** rng.uniform(-4, 0)
        for step, value in zip(STEP, curve, strict=True):
            rows.append(
                {
                    "number": trial,
                    "step": step,
                    "value": value,
                    "train/loss": value / 2,
                    "params_lr": rate,
                    "kind": ("adam", "sgd")[trial % 2],
                    "state": "FAIL" if trial == 3 else "COMPLETE",
                    "bad": trial == 4,
                }
            )
    return pandas.DataFrame(rows)


FRAME = {
    "objective": "value",
    "parameters": ["lr", "kind"],
    "metrics": ["train/loss"],
    "trial": "number",
    "step": "step",
    "state": "state",
}


def runner_record(width=4, num_trials=10, num_seeds=2):
    """Spec and blocks as our runner writes them, with weights and norms, made without training."""
    rng = np.random.default_rng(1)
    tree = {"dense": {"kernel": np.zeros((2, 3), np.float32), "bias": None}, "scale": (np.ones(2),)}
    points = _points(rng, num_trials + width)
    spec = {
        "name": "toy",
        "objective": "valid/loss",
        "maximize": False,
        "num_trials": num_trials,
        "num_seeds": num_seeds,
        "num_steps": STEP[-1],
        "eval_every": 10,
        "step": STEP,
        "independent": False,
        "keep": "best",
        "trials_per_block": width,
        "key": {"impl": "threefry2x32", "data": [0, 7]},
        "space": SPACE.to_dict(),
        "points": None,
        "dtypes": {name: str(values.dtype) for name, values in points.items()},
        "version": None,
        "norm_edges": [0.0, 1.0, 2.0, 4.0],
        "trees": {
            "params": weights.describe_tree(tree),
            "model_state": weights.describe_tree({}),
        },
        "x64": False,
        "versions": {"jax": "0.10.2", "numpy": "2.0"},
        "device_kind": "cpu",
        "fixed": {"clip": 1.5},
        "data": "0" * 64,
        "program": "0" * 64,
    }
    blocks = []
    for block in plan.blocks_of(num_trials, num_seeds, width):
        curve = _curves(rng, width)[:, 0]
        norm = rng.random(width).astype(np.float32)
        blocks.append(
            {
                "trial": block.trials,
                "seed": np.full_like(block.trials, block.seed),
                **{f"point/{n}": v[block.trials] for n, v in points.items()},
                "metrics/train/loss": curve,
                "metrics/valid/loss": curve * 2,
                "metrics/step/loss": curve,
                "metrics/step/gradient_norm": curve,
                "metrics/step/peak_gradient_norm": curve * 3,
                "metrics/step/peak_loss": curve,
                "infeasible": np.arange(width) == width - 1,
                "infeasible_step": np.where(np.arange(width) == width - 1, 15, -1).astype(np.int32),
                "infeasible_reason": (np.arange(width) == width - 1).astype(np.int8),
                "best_value": np.nanmin(curve * 2, axis=1),
                "best_step": np.full(width, 30, np.int32),
                "norms/last": norm,
                "norms/num_steps": np.full(width, 30, np.int32),
                "norms/num_clipped": np.zeros(width, np.int32),
                "norms/threshold": np.full(width, np.inf, np.float32),
                "norms/max": norm * 2,
                "norms/counts": rng.integers(0, 9, (width, 3), np.int32),
                "params/dense/kernel": np.zeros((width, 2, 3), np.float32),
                "params/scale/0": np.ones((width, 2)),
            }
        )
    return spec, blocks


def store_tuning(folder):
    """What `tune` leaves, with a chapter on instability, of studies that nobody trained."""

    def kept(name, study):
        study.save(folder / name)
        return pbx.load_study(folder / name)

    rates = np.geomspace(0.01, 1.0, 12).astype(np.float32)
    curves = _curves(np.random.default_rng(3), 12)[:, 0]
    metrics = {"train/loss": curves, "valid/loss": curves}
    grid = {"learning_rate": rates}
    sweep = kept("sweep", pbx.Study.from_arrays(grid, metrics, STEP, objective="valid/loss"))
    search, last = kept("search", imported_study()), kept("last", imported_study(6, 2))
    seen = Finding("norms", "info", "Norms.", {"norms_of_trial": 3, "low": np.nan}, "Clipping")
    columns = tuple(rates.tolist()), tuple(curves[:, -1].tolist()), (False,) * 12
    rows = [
        RemedyRow(name, 0.5, False, np.nan, 0.1, 30, 0.2, 0.0, 0, np.nan, *columns, "none", 4)
        for name in ("none", "clipping")
    ]
    comparison = RemedyComparison("clipping", tuple(rows), "valid/loss", False, 30, 1, 3, 1.5)
    steps = {
        "sweep": Verdict(0.1, (seen,), {"sweep": sweep}, 12),
        "limit": Verdict(0.5, (), {}, 0),
        "probe": Verdict(True, (), {"probe": sweep}, 0),
        "warmup": Verdict(WarmupAnswer(3, 0.5, 30, 0.5, 0.1, 0.2), (), {}, 0),
        "clipping": Verdict(1.5, (seen,), {"given": sweep}, 0),
        "remedies": Verdict(comparison, (), {"none": sweep}, 4),
    }
    answer = Stabilization("clipping", 0.2, 0, 1.5, 0.1, 0.2, comparison, steps)
    studies = {f"{n}/{o}": study for n, step in steps.items() for o, study in step.studies.items()}
    verdicts = {
        "learning_rate": Verdict(0.1, (), {"sweep_0": sweep}, 8),
        "stability": Verdict(answer, (seen,), studies, 16),
        "round_1": Verdict(None, (seen,), {"search": search}, 24),
        "retrain": Verdict({}, (), {"retrain": last}, 2),
    }
    best = last.best()
    point = {name: value.item() for name, value in best.point.items()}
    recipe = tune.Recipe(
        workload=tuned._workload(types.SimpleNamespace(**TOLD)),
        pipeline=tune.Pipeline(None, tune.cosine, 3, 1.5),
        optimizer_name="adam",
        point=point,
        values=last.data["valid/loss"].values[best.trial].min(axis=1).astype(np.float64),
        chapters=tuple(tune.Chapter(n, dataclasses.replace(seen), v) for n, v in verdicts.items()),
        total_budget=100,
        params=None,
        model_state=None,
        key=jax.random.key(0),
        num_steps=30,
        eval_every=10,
        objective="valid/loss",
        maximize=False,
    )
    tuned.store(recipe, folder, "digits_mlp")


TOLD = {"name": "w", "objective": "valid/loss", "maximize": False, "from_host": False}
COMMAND = {
    "command": "search",
    "workload": "digits_resmlp",
    "optimizer": "adam",
    "space": SearchSpace({"learning_rate": SPACE["learning_rate"]}).to_dict(),
}
BLOCKS = plan.blocks_of(6, 1, 2)
LIKE = [np.zeros((4, 3), np.float32), np.zeros(4, np.int32)]


class Corpus:
    """The records that cases begin with, stored once.

    Args:
      folder: where to work; everything in it may be replaced.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.case = self.folder / "case"
        self.out = self.folder / "out"
        self.originals = {}
        for name, study in {
            "imported": imported_study(),
            "seeds": imported_study(6, 2),
            "frame": pbx.Study.from_dataframe(a_frame(), **FRAME),
        }.items():
            study.save(self.folder / name)
            self._keep(name)
        shutil.copytree(FIXTURE, self.folder / "fixture")
        self._keep("fixture")
        spec, blocks = runner_record()
        storage.write_spec(self.folder / "runner", spec)
        for index, block in enumerate(blocks):
            storage.write_block(self.folder / "runner", index, block, storage.owner_of(spec))
        self._keep("runner")
        grid = {k: v for k, v in imported_study().points.items() if k == "learning_rate"}
        loss = _curves(np.random.default_rng(2), 18)[:, 0]
        grid["learning_rate"] = np.sort(grid["learning_rate"])
        pbx.Study.from_arrays(grid, {"loss": loss}, STEP, objective="loss").save(
            self.folder / "sweep"
        )
        self._keep("sweep")
        studies = {name: imported_study(n) for name, n in (("adam", 5), ("sgd", 6))}
        fixed = {"adam": {"eps": 1e-8}, "sgd": {"momentum": 1}}
        pbx.StudySet(studies, "optimizer", fixed).save(self.folder / "set")
        store_tuning(self.folder / "tuned")
        keeper = keeper_of(self.folder / "saves")
        for step in (10, 20):
            arrays = [np.full_like(one, step) for one in LIKE]
            keeper.between_calls(BLOCKS[:1], step, lambda arrays=arrays: arrays, None)

    def _keep(self, name):
        """A study in memory: spec and blocks, to be changed and written again."""
        folder = self.folder / name
        blocks = {i: storage.read_block(folder, i, None) for i in storage.finished_blocks(folder)}
        self.originals[name] = storage.read_spec(folder), blocks

    def fresh(self, name):
        """A copy of a stored record."""
        for folder in (self.case, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / name, self.case)
        return self.case

    def store(self, index, arrays):
        """Puts a block into the case, with the identity of the study there, if that has one."""
        try:
            owner = storage.owner_of(storage.read_spec(self.case))
        except storage.StorageError:
            return
        storage.write_block(self.case, index, arrays, owner, replace=True)


# What is behind it --------------------------------------------------------------------------------


def _is_ours(error):
    """Whether an error is this package's word: of its own type, or a ValueError that it raises."""
    if isinstance(error, storage.StorageError):
        return True
    if not isinstance(error, ValueError):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    # Not what a function of NumPy raises that our code has called.
    raises = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and Path(code.co_filename).is_relative_to(PACKAGE)


def ours(call, *args, **named):
    """What a call returns; None if it ends with our own error."""
    try:
        return call(*args, **named)
    except Exception as error:
        if not _is_ours(error):
            raise
        return None


def command(*words):
    """Runs a command; only 0 and 2 are codes of ours."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as told,
    ):
        code = cli.run(list(map(str, words)))
    if code not in (0, 2) or (code == 2) != bool(told.getvalue()):
        raise Failed(f"{words[0]} gave {code} and said {told.getvalue()!r}")


def _asked_to_train(workload, make_optimizer, points, **asked):
    """In place of `run_study`: its first look at what it is asked, and no training."""
    try:
        keys.check_key("key", asked["key"])
        _, count = plan.make_points(points, asked["num_trials"], asked["key"])
        for name in ("num_steps", "eval_every", "num_seeds"):
            _checks.check_count(name, asked[name])
    except ValueError as error:  # As if it came from there.
        raise cli.UsageError(str(error)) from error
    return types.SimpleNamespace(num_trials=count)


def check_best(study):
    """The best trial against a plain loop."""
    data = study.data
    names = (study.objective, *tie_breakers(study.objective, map(str, data.data_vars)))
    with np.errstate(all="ignore"):
        means = [study._with_seeds(name).astype(np.float64).mean(axis=1) for name in names]
    bad = study._with_seeds("infeasible").any(axis=1)
    sign = -1 if study.maximize else 1
    best = None
    for trial in np.flatnonzero(~bad):
        own = None
        for index, step in enumerate(data["step"].values):
            value, *others = (mean[trial, index] for mean in means)
            worth = [sign * value, *(np.inf if np.isnan(other) else other for other in others)]
            if np.isfinite(value) and (own is None or worth <= own[0]):
                own = (worth, int(trial), int(step))
        if own is not None and (best is None or own[0] < best[0]):
            best = own
    try:
        found = study.best()
    except pbx.NoFeasibleTrial:
        found = None
    if (found is None) != (best is None):
        raise Failed(f"best is {found}, by a loop {best}")
    if found is not None and (found.trial, found.step) != best[1:]:
        raise Failed(f"best is {found}, by a loop {best}")


def _same(one, other):
    """Whether two studies have the same arrays to the bit."""
    ones, others = ({str(n): v.values for n, v in s.data.variables.items()} for s in (one, other))
    return list(ones) == list(others) and all(
        array.dtype == others[name].dtype
        and array.shape == others[name].shape
        and (array.tolist() if array.dtype == object else array.tobytes())
        == (others[name].tolist() if array.dtype == object else others[name].tobytes())
        for name, array in ones.items()
    )


def read_study(study, folder, rng):
    """All that is made of a study without training."""
    if study is None:
        return
    repr(study)
    if rng.random() < 0.1:  # A picture takes as long as all the rest.
        study._repr_html_()
    if study.num_trials:
        check_best(study)
        for value in study.point(study.num_trials - 1).values():
            value.item()
    frame = ours(study.to_dataframe)
    if frame is not None and len(frame) != study.num_trials * study.num_seeds:
        raise Failed(f"{len(frame)} rows of {study.num_trials} trials")
    folder.mkdir(exist_ok=True)
    ours(study.to_csv, folder / "trials.csv")
    for finding in ours(pbx.diagnose, study) or ():
        str(finding)
    if study.num_trials and study.spec.get("keep", "none") != "none":
        ours(study.params, 0, 0)
    if rng.random() < 0.1:
        shutil.rmtree(folder)
        study.save(folder)
        again = pbx.load_study(folder)
        if not _same(study, again):
            raise Failed("a study is not the same after save and load")


def read_directory(corpus, rng):
    """Every reader of a study directory, and the commands that read."""
    folder = corpus.case
    study = ours(pbx.load_study, folder)
    read_study(study, corpus.out, rng)
    if rng.random() < 0.3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Blocks of another study are told of.
            ours(_read_as_runner, folder)
    if rng.random() < 0.06:
        command("diagnose", folder)
    if rng.random() < 0.02:
        command("report", folder, "--directory", corpus.out)


def _read_as_runner(folder):
    """The blocks that a call that continues the study finds."""
    points = plan.Points(None, _points(np.random.default_rng(1), 14), keys.points_key)
    store = finished.Store(folder, storage.owner_of(storage.read_spec(folder)), points)
    store.read(plan.blocks_of(10, 2, 4))


def read_set(corpus, rng):
    studies = ours(pbx.load_study_set, corpus.case)
    if studies is None:
        return
    repr(studies)
    ours(studies.best)
    ours(studies.to_dataframe)
    _ = studies.nuisance, studies.conditional, studies.cost


def keeper_of(folder):
    """What saves blocks in training, always, and brings them back."""
    points = plan.Points(None, {"rate": np.ones(6, np.float32)}, None)
    return resume.Keeper(None, finished.Store(folder, storage.NOBODY, points), -1.0)


def read_saves(folder):
    keeper = keeper_of(folder)
    for blocks in ours(keeper.groups, BLOCKS) or ():
        saved = ours(keeper.load, blocks, LIKE, 30)
        if saved is None:
            continue
        if saved.step not in (10, 20) or not (saved.arrays[0] == saved.step).all():
            raise Failed(f"an impossible save is believed: {saved}")
    ours(keeper.sweep, {0})


# The cases ----------------------------------------------------------------------------------------


def case_spec(corpus, rng):
    name = rng.choice(list(corpus.originals))
    folder = corpus.fresh(name)
    spec = copy.deepcopy(corpus.originals[name][0])
    for _ in range(rng.choice((1, 1, 2, 3))):
        spec = nasty.change(rng, spec)
    nasty.write_document(rng, folder / "study.json", spec)
    if rng.random() < 0.9:
        for index, arrays in corpus.originals[name][1].items():
            corpus.store(index, arrays)
    if rng.random() < 0.1:
        _extend(folder, rng)
    if name in ("runner", "sweep") and rng.random() < 0.15:
        kept = {**COMMAND, "command": name} if name == "sweep" else COMMAND
        (folder / "command.json").write_text(json.dumps(kept))
        command("diagnose", folder)
    read_directory(corpus, rng)


def _extend(folder, rng):
    """Says that a study is longer, in a way."""
    try:
        spec = storage.read_spec(folder)
    except storage.StorageError:
        return
    count = rng.choice((1, 12, 20, 2**31 - 1, 2**31))
    content = {"study": storage.study_identity(spec), "num_trials": count, "points": None}
    if rng.random() < 0.5:
        content["points"] = spec.get("points")
    if rng.random() < 0.5:
        content = nasty.change(rng, content)
    nasty.write_document(rng, folder / f"trials-{count:08d}.json", content)


def case_block(corpus, rng):
    name = rng.choice(list(corpus.originals))
    corpus.fresh(name)
    blocks = corpus.originals[name][1]
    every = rng.random() < 0.3
    index = rng.choice(list(blocks))
    for number in blocks if every else [index]:
        again = random.Random(index)  # The same change in all of them.
        arrays = blocks[number]
        for _ in range(rng.choice((1, 1, 2)) if not every else 1):
            arrays = nasty.change_arrays(again if every else rng, arrays)
        corpus.store(number, arrays)
    read_directory(corpus, rng)


def _one_block(corpus, rng):
    name = rng.choice(list(corpus.originals))
    folder = corpus.fresh(name)
    return rng.choice(sorted((folder / "blocks").iterdir()))


def case_header(corpus, rng):
    nasty.write_header(rng, _one_block(corpus, rng), lambda header: nasty.change(rng, header))
    read_directory(corpus, rng)


def case_sparse(corpus, rng):
    nasty.write_sparse(rng, _one_block(corpus, rng))
    read_directory(corpus, rng)


def case_files(corpus, rng):
    folder = corpus.fresh(rng.choice(list(corpus.originals)))
    kept = folder / "command.json"
    kept.write_text(json.dumps(COMMAND))
    files = [folder / "study.json", kept, *sorted((folder / "blocks").iterdir())]
    nasty.break_file(rng, rng.choice(files))
    if rng.random() < 0.1:
        shutil.rmtree(folder / "blocks")
        (folder / "blocks").symlink_to(rng.choice(("blocks", "/nowhere", "study.json")))
    read_directory(corpus, rng)


def case_set(corpus, rng):
    folder = corpus.fresh("set")
    path = folder / "studies.json"
    if rng.random() < 0.2:
        nasty.break_file(rng, path)
    else:
        nasty.write_document(rng, path, nasty.change(rng, storage.read_document(path)))
    read_set(corpus, rng)


def case_command(corpus, rng):
    name = rng.choice(("runner", "sweep", "imported"))
    folder = corpus.fresh(name)
    path = folder / "command.json"
    kept = {**COMMAND, "command": "sweep"} if name == "sweep" else COMMAND
    path.write_text(json.dumps(kept))
    if rng.random() < 0.2:
        nasty.break_file(rng, path)
    else:
        text = nasty.as_json(nasty.change(rng, kept))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    command("diagnose", folder)
    if rng.random() < 0.05:
        command("report", folder, "--directory", corpus.out)


def case_saves(corpus, rng):
    folder = corpus.fresh("saves")
    save = rng.choice(sorted((folder / "checkpoints").glob("*/step-*")))
    path = save / "manifest.json"
    what = rng.random()
    if what < 0.2:
        files = [p for p in save.rglob("*") if p.is_file()]
        nasty.break_file(rng, rng.choice(files))
    elif what < 0.3:
        save.rename(save.with_name(f"step-{rng.choice((0, 1, 30, 31, 10**9)):08d}"))
    else:
        document = storage.read_document(path)
        if rng.random() < 0.5:
            document["step"] = rng.choice((nasty.anything(rng), 10, 20, 30, 10**9, True, 10.0))
        else:
            document = nasty.change(rng, document)
        nasty.write_document(rng, path, document)
    read_saves(folder)


def case_tune(corpus, rng):
    now = {
        "num_trials": 8,
        "num_steps": 100,
        "overrides": {},
        "optimizer": "adam",
        "space": COMMAND,
    }
    for folder in (corpus.case, corpus.out):
        shutil.rmtree(folder, ignore_errors=True)
    corpus.case.mkdir()
    path = corpus.case / tune.INDEX
    nasty.write_document(rng, path, now)
    if rng.random() < 0.2:
        nasty.break_file(rng, path)
    else:
        nasty.write_document(rng, path, nasty.change(rng, now))
    tuner = types.SimpleNamespace(_directory=corpus.case, _index=lambda: now)
    ours(tune._Tuner._check_index, tuner)


def case_tuned(corpus, rng):
    folder = corpus.fresh("tuned")
    path = folder / tuned.DOCUMENT
    if rng.random() < 0.1:
        nasty.break_file(rng, path)
    else:
        document = storage.read_document(path)
        for _ in range(rng.choice((1, 1, 2))):
            document = nasty.change(rng, document)
        nasty.write_document(rng, path, document)
    command("diagnose", folder)
    told = ours(tuned.read, folder)
    if told is None:
        return
    recipe, _ = told
    tuning._facts(recipe)
    for chapter in recipe.chapters:
        tuning._table(chapter)
        if chapter.verdict.answer is not None:
            chapters.stability_decisions(chapter.verdict, lambda *args, **options: None)
    if recipe.point is not None:
        compile(ours(recipe.to_python) or "", "recipe", "exec")


def case_frame(corpus, rng):
    frame, asked = a_frame(), dict(FRAME)
    for _ in range(rng.choice((1, 1, 2))):
        column = rng.choice(list(frame.columns))
        what = rng.random()
        if not isinstance(frame[column], pandas.Series):  # There twice by now.
            break
        if what < 0.5:
            values = frame[column].astype(object).to_list()
            for _ in range(rng.choice((1, 3, len(values))) if values else 0):
                values[rng.randrange(len(values))] = nasty.anything(rng)
            frame[column] = pandas.Series(values, dtype=object)
        elif what < 0.6:
            frame = frame.drop(columns=column)
        elif what < 0.7:
            frame = frame.sample(frac=1, random_state=rng.randrange(100), ignore_index=True)
            frame = frame[: rng.randrange(len(frame) + 1)]
        elif what < 0.8:
            other = rng.choice(list(frame.columns))
            frame[column], frame[other] = frame[other].copy(), frame[column].copy()
        elif what < 0.9:
            kind = rng.choice(("category", "string", "float32", "Int64", "datetime64[ns]", "bool"))
            with contextlib.suppress(Exception):  # What pandas itself does not turn into that.
                frame[column] = frame[column].astype(kind)
        else:
            frame = frame.rename(columns={column: rng.choice((*nasty.TEXTS, 3, "value"))})
        if not len(frame.columns):
            break
    if rng.random() < 0.3:  # By way of a file.
        if rng.random() < 0.5:
            frame = a_frame()
        lines = frame.to_csv(index=False, errors="replace").splitlines()
        place = rng.randrange(len(lines))
        cells = lines[place].split(",")
        cells[rng.randrange(len(cells))] = str(nasty.anything(rng)).replace("\0", "")
        lines[place] = ",".join(cells)
        try:
            text = "\n".join(lines).encode("utf-8", "replace").decode()
            frame = pandas.read_csv(io.StringIO(text))
        except Exception:  # No table: pandas says so.
            return
    if rng.random() < 0.3:
        asked[rng.choice(list(asked))] = nasty.anything(rng)
    if rng.random() < 0.2:
        asked["infeasible"] = rng.choice(("bad", "state", "value"))
    if rng.random() < 0.2:
        asked["maximize"] = True
    if rng.random() < 0.2:
        asked["space"] = SearchSpace({"lr": SPACE["learning_rate"], "kind": SPACE["decay"]})
    read_study(ours(pbx.Study.from_dataframe, frame, **asked), corpus.out, rng)


def case_arrays(corpus, rng):
    num_trials, num_seeds = rng.choice((1, 2, 9, 18)), rng.choice((1, 1, 2))
    made = np.random.default_rng(rng.randrange(10))
    curves = _curves(made, num_trials, num_seeds)
    asked = {
        "points": _points(made, num_trials),
        "metrics": {"train/loss": curves, "valid/loss": curves * 2},
    }
    for _ in range(rng.choice((1, 2))):
        part = rng.choice(list(asked))
        asked[part] = nasty.change_arrays(rng, asked[part])
    step = nasty.change(rng, STEP) if rng.random() < 0.1 else STEP
    space = SPACE if rng.random() < 0.6 else None
    study = ours(
        pbx.Study.from_arrays,
        **asked,
        step=step,
        objective="valid/loss",
        space=space,
        maximize=rng.random() < 0.2,
    )
    read_study(study, corpus.out, rng)


def case_run(corpus, rng):
    """`run` of a study that somebody else has stored."""
    folder = corpus.fresh("runner")
    spec = copy.deepcopy(corpus.originals["runner"][0])
    if rng.random() < 0.7:
        spec = nasty.change(rng, spec)
    nasty.write_document(rng, folder / "study.json", spec)
    (folder / "command.json").write_text(nasty.as_json(COMMAND))
    command("run", folder)


CASES = {
    case_spec: 38,
    case_block: 20,
    case_header: 6,
    case_sparse: 2,
    case_files: 6,
    case_set: 4,
    case_command: 4,
    case_saves: 4,
    case_tune: 2,
    case_tuned: 4,
    case_frame: 6,
    case_arrays: 4,
    case_run: 3,
}


# The loop -----------------------------------------------------------------------------------------


def _memory(field):
    """A field of this process's status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024
    return 0


@contextlib.contextmanager
def _bounded():
    """Raises where what is inside takes too long or too much memory."""

    def stop(*_):
        raise Failed(f"more than {MAX_SECONDS} seconds")

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = _memory("VmRSS")
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    if _memory("VmHWM") - before > MAX_BYTES:
        raise Failed(f"{(_memory('VmHWM') - before) >> 20} MiB of memory")


def run_case(corpus, seed, number, draws=False, kind=None):
    """Runs one case; raises if it ends as it must not.

    Args:
      corpus: the Corpus.
      seed: of all cases.
      number: of this case: it depends on nothing else.
      draws: whether reports draw their plots, which takes seconds.
      kind: the name of the only function of `CASES` to call; any if None.
    """
    rng = random.Random(f"{seed}-{number}")
    (case,) = rng.choices(list(CASES), list(CASES.values()))
    if kind is not None:
        case = globals()[f"case_{kind}"]
    loaded = cli._Loaded(None, "adam", None, 8, 100)
    with (
        warnings.catch_warnings(),
        mock.patch.object(cli, "run_study", _asked_to_train),
        mock.patch.object(cli, "load_workload", return_value=loaded),
        contextlib.ExitStack() as more,
        mock.patch.object(os, "fsync"),
        _bounded(),
    ):
        warnings.simplefilter("error")
        if not draws:
            more.enter_context(mock.patch.object(report, "draw_plots", return_value=[]))
        case(corpus, rng)


def run(folder, num_cases, seed=0, first=0, most=20, tell=lambda text: None, **how):
    """Runs cases.

    Args:
      folder: where to work; must not exist or be empty.
      num_cases: how many.
      seed: of all of them.
      first: number of the first.
      most: failures after which to stop.
      tell: what to do with a line of progress.
      **how: see `run_case`.

    Returns:
      Failures, each a text that begins with the arguments that repeat it.
    """
    corpus = Corpus(folder)
    failures, began = [], time.monotonic()
    asked = " ".join(f"--{name} {value}" for name, value in how.items() if value)
    for number in range(first, first + num_cases):
        try:
            run_case(corpus, seed, number, **how)
        except Exception:
            failures.append(
                f"--seed {seed} --first {number} --cases 1 {asked}\n{traceback.format_exc()}"
            )
            tell(failures[-1])
            if len(failures) == most:
                break
        if (number - first) % 1000 == 999:
            tell(f"{number - first + 1} cases, {time.monotonic() - began:.0f} s")
    return failures
