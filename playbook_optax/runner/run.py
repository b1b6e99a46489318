"""`run_study`: from a workload and points to a `Study`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.records import checkpoints, schema, storage, study
from playbook_optax.runner import (
    dependence,
    devices,
    execute,
    finished,
    plan,
    processes,
    programs,
    remote,
    replay,
    resume,
    signals,
    workers,
)
from playbook_optax.runner.progress import Progress, telling
from playbook_optax.runner.trainer import TIMED, Trainer, takes_trainer
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import keys
from playbook_optax.trials.stepper import Lengths, MakeOptimizer, MakeSchedule, Stepper
from playbook_optax.trials.train import make_trial
from playbook_optax.trials.workload import WorkloadLike, resolve

# How long each width is timed.
_TIMED_SECONDS = 0.5


@takes_trainer
def run_study(
    trainer: Trainer,
    points: SearchSpace | Mapping[str, Any],
    *,
    num_steps: int,
    eval_every: int,
    key: chex.PRNGKey,
    num_trials: int | None = None,
    num_seeds: int = 1,
    independent: bool = False,
    keep: str = "none",
    directory: str | os.PathLike[str] | None = None,
) -> study.Study:
    """Trains many trials in one compiled program and returns their record.

    Trials are trained in blocks of one fixed width, which are shared out over the devices. A
    trial's bits depend on its point, the key and the width, not on the other trials, their number
    or order, or the number of devices (with at most one per core). The program is compiled once for
    a model, an optimizer and a width: how many trials, steps, seeds and evaluations there are, and
    between which ends a hyperparameter is searched, is data.

    In a job of several processes (`jax.distributed`) every process makes the same call, trains its
    share of the blocks on its own devices, and returns the whole study. Batches from the host
    (`Workload.host_batches`) are read by each process for itself, from an iterator of its own and
    for the blocks that it trains; where a mesh has a second axis, each device gets its slice.

    Args:
      trainer: a `Trainer`; or, in its place, ``workload, make_optimizer`` and any other attribute
        of `Trainer` by name: ``make_schedule``, ``fixed``, ``trials_per_block``, ``mesh``,
        ``executor``, ``executor_timeout_seconds``, ``worker``, ``checkpoint_seconds``,
        ``progress``.
      points: a `SearchSpace`, sampled quasi-randomly, or name to array (trial,).
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
      key: the only source of randomness.
      num_trials: number of trials, with a `SearchSpace`.
      num_seeds: repetitions of each trial with other initializations and batches.
      independent: give each trial its own initialization and batches, instead of common ones.
      keep: weights to keep of each trial: ``"none"``, ``"best"`` or ``"final"``.
      directory: where to store the study. A study that is there already is continued: finished
        blocks are read, not trained again.

    Returns:
      The study.

    Raises:
      ValueError: a bad argument; a workload or optimizer that breaks its promise, or a search space
        with a hyperparameter that nothing uses, before anything is compiled or written; a directory
        that holds another study; or processes of one job that differ in the call.
      NotWritable: the directory cannot be written, before the first step.
      KeyboardInterrupt: Ctrl-C. The first one stops when everything that is finished, and what is
        not, is stored; a second one stops at once.
      SystemExit: SIGTERM, likewise, with status 143.
      MemoryError: a block does not fit into the device's memory; names the width to use. A width
        that was not given is halved instead, as long as no block is stored.
      RuntimeError: the executor broke, or another process of the job failed; what is stored stays,
        and the same call continues.

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
    return train_study(
        trainer,
        points,
        num_trials,
        directory,
        num_steps=num_steps,
        eval_every=eval_every,
        key=key,
        num_seeds=num_seeds,
        independent=independent,
        keep=keep,
    )


def train_study(
    trainer: Trainer,
    points: SearchSpace | Mapping[str, Any],
    num_trials: int | None,
    directory: str | os.PathLike[str] | None,
    **question: Any,
) -> study.Study:
    """`run_study`, also for a study that is one of a set.

    Args:
      trainer: what is trained and how.
      points: as in `run_study`.
      num_trials: as in `run_study`.
      directory: as in `run_study`.
      **question: what else `StudyRunner` takes.

    Returns:
      The study.
    """
    with processes.together():
        keys.check_key("key", question["key"])
        plan.make_points(points, num_trials, question["key"])
        runner = StudyRunner(trainer, points, **question)
        return runner.run(points, num_trials=num_trials, directory=directory)


class Weights(NamedTuple):
    """Shapes of what a trial trains."""

    params: Any
    model_state: Any


class StudyRunner:
    """What trains studies of one workload and optimizer: compiled once, run with any points.

    A procedure that refines its answer in rounds runs each as a study of its own, without compiling
    again.

    Args:
      trainer: what is trained and how.
      points_like: a `SearchSpace`, or name to array (trial,), with the names and dtypes of the
        points that will be run.
      num_steps: updates of each trial.
      eval_every: updates between evaluations.
      key: the only source of randomness.
      num_seeds: repetitions of each trial.
      independent: give each trial randomness of its own.
      keep: weights to keep.
      names: names of hyperparameters in the study, and what the trainer's functions call them;
        where a name is missing, it is the same.
      member: which study of a set it is; None if of none.

    Raises:
      ValueError: a bad argument; a workload or optimizer that breaks its promise, before anything
        is compiled or written.
    """

    def __init__(
        self,
        trainer: Trainer,
        points_like: SearchSpace | Mapping[str, Any],
        *,
        num_steps: int,
        eval_every: int,
        key: chex.PRNGKey,
        num_seeds: int = 1,
        independent: bool = False,
        keep: str = "none",
        names: Mapping[str, str] | None = None,
        member: Mapping[str, Any] | None = None,
    ) -> None:
        keys.check_key("key", key)
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            raise ValueError(
                "jax_disable_jit is on, and a study is a compiled program. Turn it off, "
                'jax.config.update("jax_disable_jit", False); pbx.make_train trains one trial '
                "without it."
            )
        num_seeds = _checks.check_count("num_seeds", num_seeds)
        _checks.check_flag("independent", independent)
        # Again, because only a call knows whether it is one of a job of several processes.
        trainer.check_places()
        self._trainer = trainer
        width = trainer.trials_per_block
        self._timed = width == TIMED
        self._trials_per_block = None if width is None or isinstance(width, str) else int(width)
        self._executor = trainer.executor
        self._worker = None if trainer.worker is None else workers.check_worker(trainer.worker)
        self._mesh = processes.local_part(devices.trial_mesh(trainer.mesh))
        likeness = 1 if isinstance(points_like, SearchSpace) else None
        points, _ = plan.make_points(points_like, likeness, key)
        self._like = points.rows(np.arange(1))
        trial = make_trial(
            trainer.workload,
            trainer.make_optimizer,
            num_steps,
            eval_every,
            keep=keep,
            make_schedule=trainer.make_schedule,
        )
        self._lengths = Lengths(trial.num_steps, min(int(eval_every), trial.num_steps))
        self._eval_steps = trial.eval_steps
        self._recipe: dict[str, Any] = {
            "points_like": self._like,
            "num_steps": num_steps,
            "eval_every": eval_every,
            "num_seeds": num_seeds,
            "independent": independent,
            "keep": keep,
            "names": names,
            "member": member,
        }
        self._key = key
        self._functions = (trainer.workload, trainer.make_optimizer, trainer.make_schedule)
        self._num_seeds, self._independent, self._keep = num_seeds, independent, keep
        self._eval_every, self._member = eval_every, member
        # Widths of which a device's memory holds one block only.
        self._one_place: set[int] = set()
        self._columns = plan.Columns(dict(names or {}), self._like, trainer.fixed)
        table = self._columns.of_program(self._like)
        first = {name: values[0] for name, values in table.items()}
        self._work = resolve(trainer.workload, first)
        host = self._work.host_batches
        self._chunk = None if host is None else execute.first_batches(host)
        self._stepper = Stepper(*self._functions, keep == "best")
        self._arguments = (first, keys.trial_key(key), self._work.data, self._chunk)
        self._outline = programs.outline(self._functions, self._arguments, self._sketched)
        self._weights = Weights(*self._outline.weights)
        self._keeps_best = programs.keeps_best(keep, self._weights)
        self._stepper.keeps_best = self._keeps_best
        self._auto_width = self._outline.width
        # Whether the user's schedule takes a number of steps that is data.
        self._takes_lengths = True
        self._fingerprints: dict[str, str | None] = {}
        self._engines: dict[int, execute.Engine] = {}
        # Traced before anything is compiled or written, so that a bad workload says so first.
        with telling(trainer.progress, self._work.name):
            found = self._programs(self._trials_per_block or self._auto_width)
            study.check_names(self._like, found.state_shapes.metrics.names)
            # What a procedure calls otherwise in the program is its own.
            own = [name for name in self._like if not (names and name in names)]
            dependence.check(found.unused_names, points, own, self._functions)
        self._arrays = execute.describe_block(found, self._work, self._eval_steps, keep, self._like)

    def _sketched(self) -> programs.Outline:
        weights = jax.eval_shape(self._stepper.weights, *self._arguments[:2])
        return programs.Outline(weights, plan.choose_width(self._stepper, *self._arguments))

    def _programs(self, width: int) -> programs.Programs:
        """The programs for blocks of a width, traced already."""
        chunk = self._chunk
        if chunk is not None:
            length = execute.chunk_length(chunk)
            chunk = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    (length, *leaf.shape[1:]),
                    leaf.dtype,
                    sharding=programs.chunk_sharding(self._mesh, leaf),
                ),
                chunk,
            )
        shapes = programs.Shapes(
            self._mesh,
            width,
            programs.room_for(len(self._eval_steps)),
            self._independent,
            self._columns.of_program(self._like),
            self._arguments[1],
            jax.eval_shape(lambda data: data, self._work.data),
            chunk,
            None if self._takes_lengths else int(self._lengths.num_steps),
        )
        what = (
            self._trainer.programs,
            lambda: self._stepper,
            self._functions,
            self._keeps_best,
        )
        if not self._takes_lengths or self._trainer.make_schedule is None:
            return programs.find(*what, shapes)
        try:
            return programs.find(*what, shapes)
        except Exception:
            # Perhaps it is the number itself that the schedule needs; else this says what it is.
            own = dataclasses.replace(shapes, num_steps=int(self._lengths.num_steps))
            found = programs.find(*what, own)
        self._takes_lengths = False
        return found

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What is recorded at each evaluation."""
        programs = self._programs(self._trials_per_block or self._auto_width)
        return programs.state_shapes.metrics.names

    @property
    def takes_lengths(self) -> bool:
        """Whether runs of any length share the program."""
        return self._takes_lengths

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
        with processes.together() as group, telling(self._trainer.progress, self._work.name):
            while True:
                begun = self._begin(points, num_trials, directory)
                try:
                    return self._train(*begun, directory, {})
                except execute.OutOfMemory:
                    if group is not None or not self._narrow(begun, directory):
                        raise

    def prepare(
        self,
        points: SearchSpace | Mapping[str, Any],
        *,
        num_trials: int | None = None,
        directory: str | os.PathLike[str],
    ) -> None:
        """Stores a study's spec and trains nothing, for others to train.

        Args:
          points: as for `run`.
          num_trials: as for `run`.
          directory: as for `run`.

        Raises:
          ValueError: as for `run`.
          NotWritable: as for `run`.
        """
        _, count, _, spec = self._begin(points, num_trials, directory)
        self._write_spec(directory, {**spec, "num_trials": count})

    def _begin(
        self,
        points: SearchSpace | Mapping[str, Any],
        num_trials: int | None,
        directory: str | os.PathLike[str] | None,
    ) -> tuple[plan.Points, int, int, dict[str, Any]]:
        """The points, their number, the width of blocks, and the spec, which fits the directory."""
        if self._worker is not None and directory is None:
            raise ValueError("worker needs directory=, which all workers share.")
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
            checkpoints.remove_temporary_folders(directory)
            try:
                stored = schema.read_spec(directory)
            except storage.NoStudy:
                stored = None
        group = processes.current()
        width = self._trials_per_block
        if width is None and stored is not None:
            width = int(stored["trials_per_block"])
        if width is None and (group is None or group.index == 0):
            width = self._chosen_width(count)
        if group is not None and self._trials_per_block is None:
            width = int(group.share(width))
        assert width is not None
        spec = self._spec(rows, width, fingerprints=directory is not None)
        if stored is not None:
            self._check_resumable(stored, spec, directory)
        elif (
            directory is not None
            and group is None
            and self._trials_per_block is None
            and not storage.write_spec(directory, {**spec, "num_trials": count})
        ):
            # Of several processes that begin one study, the first decides the width.
            return self._begin(points, num_trials, directory)
        return rows, count, width, spec

    def fitting_width(self, num_trials: int) -> int:
        """The width that a new study of so many trials gets.

        Args:
          num_trials: number of trials.

        Returns:
          Trials per block.

        Raises:
          OutOfMemory: a given width does not fit, or not even one trial.
        """
        width = self._trials_per_block
        width = self._chosen_width(num_trials) if width is None else width
        self._check_fits(width, num_trials)
        return width

    def rehearse(
        self, width: int, num_trials: int, points: plan.Points, seconds: float
    ) -> tuple[float, float]:
        """Trains the first steps of a study at some width, for their time alone.

        Args:
          width: trials per block.
          num_trials: trials of the study.
          points: its points.
          seconds: how long to go on, about; compiling is not counted.

        Returns:
          Seconds for one evaluation and for one step, of one trial, with all devices at work.
        """
        engine = self.engine(width, -(-num_trials // width))
        blocks = plan.blocks_of(engine.blocks_per_call * width, 1, width)
        evaluation, step = engine.rehearse(blocks, points, seconds)
        trials = len(blocks) * width
        return evaluation / trials, step / trials

    def _fastest_width(self, by_size: int, num_trials: int) -> int:
        """The width whose steps are the fastest of those that fit."""
        points = plan.Points(None, self._like, self._key)
        num_devices = self._mesh.shape[devices.TRIALS_AXIS]
        widths = plan.widths_to_time(by_size, num_trials, num_devices)
        seconds = {
            width: self.rehearse(width, num_trials, points, _TIMED_SECONDS)[1]
            for width in widths
            if self._fits(width, num_trials)
        }
        if not seconds:
            return by_size
        fastest = min(seconds, key=lambda width: (seconds[width], width))
        self._engines = {fastest: self._engines[fastest]}
        return fastest

    def _chosen_width(self, num_trials: int) -> int:
        """By backend and size of a step or by timing, halved until a block fits into memory."""
        width = self._auto_width
        if jax.default_backend() != "cpu":
            # A small study is not as wide as a large one: it would cost as much.
            most = -(-num_trials // self._mesh.shape[devices.TRIALS_AXIS])
            width = min(width, 1 << (most - 1).bit_length())
        if self._timed:
            self._auto_width = width = self._fastest_width(width, num_trials)
            self._timed = False
        while not self._fits(width, num_trials) and width > 1:
            self._auto_width = width = width // 2
        return width

    def _fits(self, width: int, num_trials: int) -> bool:
        """Whether blocks of this width fit, if need be one to a device; as far as can be told."""
        free = devices.free_memory(self._mesh)
        if free is None or self._executor is not None:
            return True
        num_blocks = -(-num_trials // width)
        if self.engine(width, num_blocks).memory <= free:
            return True
        self._one_place.add(width)
        return self.engine(width, num_blocks).memory <= free

    def _check_fits(self, width: int, num_trials: int) -> None:
        if self._fits(width, num_trials):
            return
        fitting = width
        while fitting > 1 and not self._fits(fitting, num_trials):
            fitting //= 2
        raise execute.OutOfMemory(execute.too_wide(width, fitting))

    def _narrow(
        self,
        begun: tuple[plan.Points, int, int, dict[str, Any]],
        directory: str | os.PathLike[str] | None,
    ) -> bool:
        """Halves the width after the device ran out of memory, if it is ours and nothing is stored.

        Returns:
          Whether another attempt is worth it.
        """
        rows, count, width, _ = begun
        ours = self._trials_per_block is None and self._worker is None and self._executor is None
        stored = directory is not None and storage.finished_blocks(directory)
        if not ours or stored or width == 1:
            return False
        self._auto_width = width // 2
        if directory is not None:
            spec = self._spec(rows, self._auto_width, fingerprints=True)
            storage.write_spec(directory, {**spec, "num_trials": count}, replace=True)
        return True

    def _spec(self, points: plan.Points, width: int, *, fingerprints: bool) -> dict[str, Any]:
        spec = plan.make_spec(
            work=self._work,
            lengths=self._lengths,
            eval_steps=self._eval_steps,
            points=points,
            num_trials=0,
            num_seeds=self._num_seeds,
            eval_every=self._eval_every,
            independent=self._independent,
            keep=self._keep,
            key=self._key,
            width=width,
            shapes=self._weights,
            arrays=self._arrays,
            member=self._member,
        )
        if self._columns.fixed:
            spec["fixed"] = {name: value.item() for name, value in self._columns.fixed.items()}
        if fingerprints or self._executor is not None or processes.current() is not None:
            if not self._fingerprints:
                self._fingerprints = {
                    "data": plan.fingerprint_data(self._work.data),
                    "program": self._fingerprint_of_program(),
                    "code": programs.digest_of(self._functions),
                }
            spec |= self._fingerprints
        return spec

    def _fingerprint_of_program(self) -> str:
        """Of a whole trial's training, whatever its length, width and devices."""
        num_steps = None if self._takes_lengths else int(self._lengths.num_steps)
        stepper, room = self._stepper, programs.room_for(1)

        def whole(point: Any, key: Any, data: Any, batches: Any, numbers: Any) -> Any:
            lengths = Lengths(numbers[0] if num_steps is None else num_steps, numbers[1])
            state = stepper.begin(point, key, data, lengths, room, batches)
            state = stepper.update(state, data, lengths, numbers[2], batches, numbers[2])
            return stepper.record(state, data, lengths, numbers[3])

        return plan.fingerprint_program(whole, *self._arguments, np.zeros(4, np.int32))

    def _of_trainer(self) -> dict[str, Any]:
        """What an executor's worker needs of the trainer."""
        names = ("workload", "make_optimizer", "make_schedule", "fixed")
        return {name: getattr(self._trainer, name) for name in names}

    def engine(self, width: int, num_blocks: int) -> execute.Engine:
        """The engine for blocks of this width, made for a study of about so many blocks."""
        num_devices = self._mesh.shape[devices.TRIALS_AXIS]
        places = execute.blocks_per_device(width, num_blocks, num_devices)
        if width in self._one_place:
            places = 1
        engine = self._engines.get(width)
        if engine is None or engine.blocks_per_device != places:
            engine = self._engines[width] = execute.Engine(
                self._programs(width),
                self._work,
                self._key,
                self._lengths,
                self._keep,
                places,
                self._columns,
            )
        return engine

    def _train(
        self,
        points: plan.Points,
        num_trials: int,
        width: int,
        spec: Mapping[str, Any],
        directory: str | os.PathLike[str] | None,
        before: Mapping[int, dict[str, np.ndarray]],
    ) -> study.Study:
        """Trains whatever is missing of the first `num_trials` trials."""
        spec = {**spec, "num_trials": num_trials}
        blocks = plan.blocks_of(num_trials, self._num_seeds, width)
        done = dict(before)
        steps = width * int(self._lengths.num_steps)
        with (
            processes.together() as group,
            signals.stop_requests(_where_finished_is(directory)) as stop,
        ):
            if group is not None:
                group.agree(spec)
            owner = storage.NOBODY
            if directory is not None:
                if group is not None:
                    group.check_shared(directory)
                owner = self._write_spec(directory, spec)
            store = finished.Store(directory, owner, points)
            done |= store.read(block for block in blocks if block.index not in done)
            shared = self._worker is not None
            keeper = resume.Keeper(stop, store, self._trainer.checkpoint_seconds, shared)
            keeper.sweep(set(done))
            missing = [block for block in blocks if block.index not in done]
            if missing:
                self._check_fits(width, num_trials)
            seeds = f" x {self._num_seeds} seeds" if self._num_seeds > 1 else ""
            what = f"{num_trials} trials x {int(self._lengths.num_steps):,} steps{seeds}"
            cost = num_trials * self._num_seeds * int(self._lengths.num_steps)
            with (
                telling(self._trainer.progress, self._work.name),
                Progress(what, len(blocks), len(missing), steps, cost) as progress,
            ):
                for batch in self._finish(missing, points, width, spec, store, keeper):
                    done |= dict(batch)
                    real = [arrays["trial"] < num_trials for _, arrays in batch]
                    progress.update(
                        len(batch),
                        sum(int(rows.sum()) for rows in real),
                        sum(
                            int((arrays["infeasible"] & rows).sum())
                            for rows, (_, arrays) in zip(real, batch, strict=True)
                        ),
                    )
                    keeper.check()
            keeper.sweep(set(done))
        kept = self._keep != "none"
        like = self._weights._asdict() if kept else None
        extend = None
        if points.space is not None:

            def extend(total: int) -> study.Study:
                return self._train(points, total, width, spec, directory, done)

        def replay_run(
            record: study.Study, trial: int, seed: int, start: int, stop: int, per_layer: bool
        ) -> Any:
            block = plan.blocks_of(trial + 1, self._num_seeds, width)[seed - self._num_seeds]
            engine = self.engine(width, 1)
            program = replay.Replayer(engine, trial % width, per_layer)
            return program.run(record, block, points, trial, start, stop)

        return study.study_from_blocks(
            spec,
            [done[block.index] for block in blocks],
            weights_like=like,
            extend=extend,
            replay=replay_run,
            directory=directory,
        )

    def _finish(
        self,
        missing: Sequence[plan.Block],
        points: plan.Points,
        width: int,
        spec: Mapping[str, Any],
        store: finished.Store,
        keeper: resume.Keeper,
    ) -> Iterator[finished.Finished]:
        """Trains blocks here, or has them trained, and yields them once they are stored."""
        group = processes.current()
        num_blocks = -(-len(missing) // self._num_seeds)
        if group is not None:
            engine = self.engine(width, -(-num_blocks // group.size))
            return group.train(engine, missing, points, store, keeper)
        if self._worker is not None:
            engine = self.engine(width, -(-num_blocks // self._worker[1]))
            return workers.train(engine, missing, points, store, self._worker, keeper)
        if self._executor is None:
            engine = self.engine(width, num_blocks)
            return store.write(engine.run(missing, points, keeper))
        batches = remote.train(
            self._executor,
            missing,
            points,
            spec=spec,
            promised={
                name: (storage.stored_dtype(dtype), (width, *shape))
                for name, (dtype, shape) in self._arrays.items()
            },
            train_blocks=lambda blocks, points: self.engine(width, 1).run(blocks, points),
            make_payload=lambda: remote.pack(
                _rebuild,
                {**self._recipe, **self._of_trainer(), "trials_per_block": width},
                self._key,
                spec,
            ),
            check=keeper.check,
            where=_where_finished_is(store.directory),
            timeout_seconds=self._trainer.executor_timeout_seconds,
        )
        return store.write(batches)

    def _check_resumable(
        self, stored: Mapping[str, Any], spec: Mapping[str, Any], directory: Any
    ) -> None:
        plan.check_resumable(stored, spec, directory, self._trainer.accept_changed_program)

    def _write_spec(
        self, directory: str | os.PathLike[str], spec: Mapping[str, Any]
    ) -> storage.Owner:
        """Stores the spec before the first block, or that the study is longer by now."""
        if storage.write_spec(directory, spec):
            return storage.owner_of(spec)
        stored = schema.read_spec(directory)
        # Another process may have begun another study here since the first look.
        self._check_resumable(stored, spec, directory)
        if stored["num_trials"] < spec["num_trials"]:
            longer = {"num_trials": spec["num_trials"], "points": spec["points"]}
            storage.extend_spec(directory, {**stored, **longer})
        return storage.owner_of(stored)


def _where_finished_is(directory: str | os.PathLike[str] | None) -> str:
    """The end of a message when a study stops before it is whole."""
    if directory is None:
        return "Nothing is stored without directory=."
    return f"What is finished is stored in {str(directory)!r}: the same call continues."


def _rebuild(
    workload: WorkloadLike,
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None,
    fixed: Mapping[str, Any],
    trials_per_block: int,
    points_like: Mapping[str, Any],
    **recipe: Any,
) -> tuple[remote.TrainBlocks, dict[str, Any]]:
    """What trains a study's blocks in a worker, and its spec."""
    trainer = Trainer(
        workload,
        make_optimizer,
        make_schedule,
        fixed=fixed,
        trials_per_block=trials_per_block,
        progress=False,
    )
    runner = StudyRunner(trainer, points_like, **recipe)
    points, _ = plan.make_points(points_like, None, recipe["key"])
    spec = runner._spec(points, trials_per_block, fingerprints=True)
    return runner.engine(trials_per_block, 1).run, spec
