"""`run_study`: from a workload and points to a `Study`."""

import os
from collections.abc import Mapping
from typing import Any

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.records import storage, study
from playbook_optax.runner import devices, execute, plan, replay
from playbook_optax.runner.progress import Progress
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import train
from playbook_optax.trials.workload import WorkloadLike, resolve

_MUCH_LONGER = 4


@_checks.named_arguments
def run_study(
    workload: WorkloadLike,
    make_optimizer: train.MakeOptimizer,
    points: SearchSpace | Mapping[str, Any],
    *,
    num_steps: int,
    eval_every: int,
    key: chex.PRNGKey,
    num_trials: int | None = None,
    num_seeds: int = 1,
    independent: bool = False,
    keep: str = "none",
    make_schedule: train.MakeSchedule | None = None,
    trials_per_block: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> study.Study:
    """Trains many trials in one compiled program and returns their record.

    Trials are trained in blocks of one fixed width, which is compiled once; blocks are shared out
    over the devices. A trial's bits depend on its point, the key and the width, not on the other
    trials, their number or order, or the number of devices (with at most one per core).

    Args:
      workload: a `Workload`, or a function of the point that gives one.
      make_optimizer: ``make_optimizer(point)`` returns any Optax transformation.
      points: a `SearchSpace`, sampled quasi-randomly, or name to array (trial,).
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
      key: the only source of randomness.
      num_trials: number of trials, with a `SearchSpace`.
      num_seeds: repetitions of each trial with other initializations and batches.
      independent: give each trial its own initialization and batches, instead of common ones.
      keep: weights to keep of each trial: ``"none"``, ``"best"`` or ``"final"``.
      make_schedule: ``make_schedule(point, num_steps)`` returns a schedule, which reaches
        `make_optimizer` as ``point["learning_rate"]``.
      trials_per_block: width of a block: 1 trains one trial after another inside the program,
        which is the faster on a CPU above about 1 MFLOP a step. Chosen by backend and size if None.
      mesh: a one-dimensional mesh to shard trials over; all local devices if None.
      directory: where to store the study. A study that is there already is continued: finished
        blocks are read, not trained again.
      progress: show a progress bar when standard error is a terminal.

    Returns:
      The study.

    Raises:
      ValueError: a bad argument; a workload or optimizer that breaks its promise, before anything
        is compiled or written; or a directory that holds another study.
      NotWritable: the directory cannot be written, before the first step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 10.0, scale="log")})
      >>> study = pbx.run_study(
      ...     workload, lambda point: pbx.sgd(point["learning_rate"]), space, num_trials=12,
      ...     num_steps=20, eval_every=10, key=jax.random.key(0))
      >>> bool(study.data["infeasible"].any()), study.best().value < 1e-6
      (True, True)

    Source: playbook, "Where can I find an implementation of quasi-random search?" and "How many
    trials are needed to get good results with quasi-random search?"
    """
    train.check_key("key", key)
    plan.make_points(points, num_trials, key)
    runner = StudyRunner(
        workload,
        make_optimizer,
        points,
        num_steps=num_steps,
        eval_every=eval_every,
        key=key,
        num_seeds=num_seeds,
        independent=independent,
        keep=keep,
        make_schedule=make_schedule,
        trials_per_block=trials_per_block,
        mesh=mesh,
        progress=progress,
    )
    return runner.run(points, num_trials=num_trials, directory=directory)


class StudyRunner:
    """What trains studies of one workload and optimizer: compiled once, run with any points.

    A procedure that refines its answer in rounds runs each as a study of its own, without compiling
    again.

    Args:
      workload: as in `run_study`, as are all others.
      make_optimizer: makes the optimizer of a point.
      points_like: a `SearchSpace`, or name to array (trial,), with the names and dtypes of the
        points that will be run.
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
      key: the only source of randomness.
      num_seeds: repetitions of each trial.
      independent: give each trial randomness of its own.
      keep: weights to keep.
      make_schedule: makes the schedule of a point.
      trials_per_block: width of a block.
      mesh: mesh to shard trials over.
      progress: show a progress bar.

    Raises:
      ValueError: a bad argument; a workload or optimizer that breaks its promise, before anything
        is compiled or written.
    """

    def __init__(
        self,
        workload: WorkloadLike,
        make_optimizer: train.MakeOptimizer,
        points_like: SearchSpace | Mapping[str, Any],
        *,
        num_steps: int,
        eval_every: int,
        key: chex.PRNGKey,
        num_seeds: int = 1,
        independent: bool = False,
        keep: str = "none",
        make_schedule: train.MakeSchedule | None = None,
        trials_per_block: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        progress: bool = True,
    ) -> None:
        train.check_key("key", key)
        num_seeds = _checks.check_count("num_seeds", num_seeds)
        if not isinstance(independent, bool):
            raise _checks.ArgumentTypeError(
                f"independent must be True or False, got {independent!r}."
            )
        if trials_per_block is not None:
            trials_per_block = _checks.check_count("trials_per_block", trials_per_block)
        self._mesh = devices.trial_mesh(mesh)
        likeness = 1 if isinstance(points_like, SearchSpace) else None
        points, _ = plan.make_points(points_like, likeness, key)
        self._like = points.rows(np.arange(1))
        trial = train.make_trial(
            workload,
            make_optimizer,
            num_steps,
            eval_every,
            keep=keep,
            make_schedule=make_schedule,
        )
        self._workload, self._trial, self._key = workload, trial, key
        self._num_seeds, self._independent, self._keep = num_seeds, independent, keep
        self._eval_every, self._progress = eval_every, progress
        self._trials_per_block = trials_per_block
        first = {name: values[0] for name, values in self._like.items()}
        self._work = resolve(workload, first)
        data = self._work.data
        own_key = train.trial_key(key)
        host = self._work.host_batches
        batches = None if host is None else execute.first_batches(host)

        def whole(point: Any, key: chex.PRNGKey, data: Any, batches: Any) -> train.TrialResult:
            state = trial.init(point, key, data, batches)
            state = trial.advance(state, data, 0, trial.num_steps, batches)
            return trial.result(state)

        # Traced before anything is compiled or written, so that a bad workload says so first.
        self._arguments = (first, own_key, data, batches)
        self._whole = whole
        self._shapes = jax.eval_shape(whole, *self._arguments)
        self._make_batch = None
        if host is None and not independent:
            self._make_batch = train.shared_batches(workload, first, data, own_key)
        self._fingerprints: dict[str, str] = {}
        self._engines: dict[int, execute.Engine] = {}

    def run(
        self,
        points: SearchSpace | Mapping[str, Any],
        *,
        num_trials: int | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> study.Study:
        """Runs one study.

        Args:
          points: as in `run_study`, with the names and dtypes of `points_like`.
          num_trials: as in `run_study`.
          directory: as in `run_study`.

        Returns:
          The study.

        Raises:
          ValueError: other names or dtypes, or a directory that holds another study.
          NotWritable: the directory cannot be written, before the first step.
        """
        rows, count = plan.make_points(points, num_trials, self._key)
        first = rows.rows(np.arange(1))
        wanted = {name: values.dtype for name, values in self._like.items()}
        given = {name: values.dtype for name, values in first.items()}
        if wanted != given:
            raise ValueError(f"points have {given}, but the program was made for {wanted}.")
        stored = None
        if directory is not None:
            storage.check_writable(directory)
            storage.remove_temporary_files(directory)
            try:
                stored = storage.read_spec(directory)
            except storage.NoStudy:
                stored = None
        width = self._trials_per_block
        if width is None and stored is not None:
            width = int(stored["trials_per_block"])
        if width is None:
            width = self._trials_per_block = plan.choose_width(self._workload, *self._arguments)
        spec = plan.make_spec(
            work=self._work,
            trial=self._trial,
            points=rows,
            num_trials=0,
            num_seeds=self._num_seeds,
            eval_every=self._eval_every,
            independent=self._independent,
            keep=self._keep,
            key=self._key,
            width=width,
            shapes=self._shapes,
        )
        if directory is not None:
            if not self._fingerprints:
                self._fingerprints = {
                    "data": plan.fingerprint_data(self._work.data),
                    "program": plan.fingerprint_program(self._whole, *self._arguments),
                }
            spec |= self._fingerprints
        if stored is not None:
            plan.check_resumable(stored, spec, directory)
        return self._train(rows, count, width, spec, directory, {})

    def _engine(self, width: int, num_blocks: int) -> execute.Engine:
        """The engine for blocks of this width, made for a study of about so many blocks."""
        num_devices = self._mesh.shape[devices.TRIALS_AXIS]
        wanted = execute.blocks_per_device(width, num_blocks, num_devices)
        engine = self._engines.get(width)
        # Another number of places is another program: worth it only for a much longer study.
        if engine is None or wanted > _MUCH_LONGER * engine.blocks_per_device:
            engine = self._engines[width] = execute.Engine(
                self._trial,
                self._key,
                self._work.data,
                self._mesh,
                width,
                wanted,
                self._independent,
                self._make_batch,
                self._work.host_batches,
                self._like,
            )
        return engine

    def _train(
        self,
        points: plan.Points,
        num_trials: int,
        width: int,
        spec: Mapping[str, Any],
        directory: str | os.PathLike[str] | None,
        finished: Mapping[int, dict[str, np.ndarray]],
    ) -> study.Study:
        """Trains whatever is missing of the first `num_trials` trials."""
        blocks = plan.blocks_of(num_trials, self._num_seeds, width)
        spec = {**spec, "num_trials": num_trials}
        done = dict(finished)
        if directory is not None:
            _write_spec(directory, spec)
            done |= _read_blocks(directory, {block.index for block in blocks} - set(done))
        missing = [block for block in blocks if block.index not in done]
        steps = width * self._trial.num_steps
        engine = self._engine(width, max(1, len(missing) // self._num_seeds))
        with Progress(self._progress, self._work.name, len(missing), steps) as progress:
            for batch in engine.run(missing, points):
                for index, arrays in batch:
                    if directory is not None:
                        storage.write_block(directory, index, arrays)
                    done[index] = arrays
                real = [arrays["trial"] < num_trials for _, arrays in batch]
                progress.update(
                    len(batch),
                    sum(int(rows.sum()) for rows in real),
                    sum(
                        int((arrays["infeasible"] & rows).sum())
                        for rows, (_, arrays) in zip(real, batch, strict=True)
                    ),
                )
        kept = self._keep != "none"
        like = {k: getattr(self._shapes, k) for k in ("params", "model_state")} if kept else None
        extend = None
        if points.space is not None:

            def extend(total: int) -> study.Study:
                return self._train(points, total, width, spec, directory, done)

        def replay_run(
            record: study.Study, trial: int, seed: int, start: int, stop: int, per_layer: bool
        ) -> Any:
            block = plan.blocks_of(trial + 1, self._num_seeds, width)[seed - self._num_seeds]
            program = replay.Replayer(engine, self._workload, trial % width, per_layer)
            return program.run(record, block, points, trial, start, stop)

        return study.study_from_blocks(
            spec,
            [done[block.index] for block in blocks],
            weights_like=like,
            extend=extend,
            replay=replay_run,
        )


def _write_spec(directory: str | os.PathLike[str], spec: Mapping[str, Any]) -> None:
    """Stores the spec before the first block; a longer study replaces a shorter one's."""
    if storage.write_spec(directory, spec, replace=False):
        return
    stored = storage.read_spec(directory)
    # Another process may have begun another study here since the first look.
    plan.check_resumable(stored, spec, directory)
    if stored["num_trials"] < spec["num_trials"]:
        kept = {"num_trials": spec["num_trials"], "points": spec["points"]}
        storage.write_spec(directory, {**stored, **kept})


def _read_blocks(
    directory: str | os.PathLike[str], wanted: set[int]
) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for index in wanted & set(storage.finished_blocks(directory)):
        try:
            found[index] = storage.read_block(directory, index)
        except storage.CorruptBlock:
            continue  # Trained again, and replaced.
    return found
