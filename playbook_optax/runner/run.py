"""`run_study`: from a workload and points to a `Study`."""

import concurrent.futures
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import numpy as np

from playbook_optax import _checks
from playbook_optax.records import checkpoints, storage, study
from playbook_optax.runner import (
    devices,
    execute,
    finished,
    plan,
    processes,
    remote,
    replay,
    resume,
    signals,
    workers,
)
from playbook_optax.runner.progress import Progress
from playbook_optax.search_space import SearchSpace
from playbook_optax.trials import train
from playbook_optax.trials.workload import WorkloadLike, resolve

_MUCH_LONGER = 4
TIMED = "timed"
# How long each width is timed.
_TIMED_SECONDS = 0.5


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
    trials_per_block: int | str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    executor: concurrent.futures.Executor | None = None,
    worker: tuple[int, int] | None = None,
    directory: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> study.Study:
    """Trains many trials in one compiled program and returns their record.

    Trials are trained in blocks of one fixed width, which is compiled once; blocks are shared out
    over the devices. A trial's bits depend on its point, the key and the width, not on the other
    trials, their number or order, or the number of devices (with at most one per core).

    In a job of several processes (`jax.distributed`) every process makes the same call, trains its
    share of the blocks on its own devices, and returns the whole study. Batches from the host
    (`Workload.host_batches`) are read by each process for itself, from an iterator of its own and
    for the blocks that it trains; where a mesh has a second axis, each device gets its slice.

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
        which is the faster on a CPU above about 1 MFLOP a step. Chosen by backend and size if None;
        ``"timed"`` compiles and times one, some and all trials side by side, for about half a
        second each, and takes the fastest. The width decides bits, so that a study is repeated
        exactly with the one that its spec records; a stored study keeps it.
      mesh: a mesh to shard trials over; all local devices if None. A second axis, whatever its
        name, cuts the batches of each trial, for trials that need several devices. Of a mesh over
        several processes, each uses its own devices.
      executor: a PEP 3148 executor, such as `concurrent.futures.ProcessPoolExecutor` with spawned
        workers or ``client.get_executor()`` of a Dask client; its workers train the blocks, this
        process stores them. A worker that is killed costs the blocks it was training, which are
        trained again.
      worker: ``(i, n)``: this process is worker i of n that make the same call with the same
        `directory`. It trains its share and then whatever is still missing, so that the study gets
        whole though other workers die.
      directory: where to store the study. A study that is there already is continued: finished
        blocks are read, not trained again.
      checkpoint_seconds: with `directory`, how long to train between saves of blocks that are not
        finished; a killed run loses no more than that.
      progress: show a progress bar when standard error is a terminal.

    Returns:
      The study.

    Raises:
      ValueError: a bad argument; a workload or optimizer that breaks its promise, before anything
        is compiled or written; a directory that holds another study; or processes of one job that
        differ in the call.
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
    with processes.together():
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
            executor=executor,
            worker=worker,
            checkpoint_seconds=checkpoint_seconds,
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
      executor: whose workers train.
      worker: which worker of how many.
      checkpoint_seconds: how long to train between saves of unfinished blocks.
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
        trials_per_block: int | str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        executor: concurrent.futures.Executor | None = None,
        worker: tuple[int, int] | None = None,
        checkpoint_seconds: float = 60.0,
        progress: bool = True,
    ) -> None:
        train.check_key("key", key)
        num_seeds = _checks.check_count("num_seeds", num_seeds)
        if not isinstance(independent, bool):
            raise _checks.ArgumentTypeError(
                f"independent must be True or False, got {independent!r}."
            )
        self._timed = trials_per_block == TIMED
        if isinstance(trials_per_block, str):
            _checks.check_choice("trials_per_block", trials_per_block, (TIMED,))
            if executor is not None:
                raise ValueError(
                    f"trials_per_block={TIMED!r} times this machine, and the executor's workers "
                    "may be others; give a number."
                )
            trials_per_block = None
        if trials_per_block is not None:
            trials_per_block = _checks.check_count("trials_per_block", trials_per_block)
        _check_places(mesh, executor, worker)
        _checks.check_number("checkpoint_seconds", checkpoint_seconds, at_least=0.0)
        self._checkpoint_seconds = float(checkpoint_seconds)
        self._executor = executor
        self._worker = None if worker is None else workers.check_worker(worker)
        self._mesh = processes.local_part(devices.trial_mesh(mesh))
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
        self._recipe: dict[str, Any] = {
            "workload": workload,
            "make_optimizer": make_optimizer,
            "make_schedule": make_schedule,
            "points_like": self._like,
            "num_steps": num_steps,
            "eval_every": eval_every,
            "num_seeds": num_seeds,
            "independent": independent,
            "keep": keep,
        }
        self._workload, self._trial, self._key = workload, trial, key
        self._num_seeds, self._independent, self._keep = num_seeds, independent, keep
        self._eval_every, self._progress = eval_every, progress
        self._trials_per_block = trials_per_block
        self._auto_width: int | None = None
        # Widths of which a device's memory holds one block only.
        self._one_place: set[int] = set()
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
        with processes.together() as group:
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
        _write_spec(directory, {**spec, "num_trials": count})

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
                stored = storage.read_spec(directory)
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
            plan.check_resumable(stored, spec, directory)
        elif (
            directory is not None
            and group is None
            and self._trials_per_block is None
            and not storage.write_spec(directory, {**spec, "num_trials": count}, replace=False)
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
        if self._auto_width is None:
            self._auto_width = plan.choose_width(self._workload, *self._arguments)
            if self._timed:
                self._auto_width = self._fastest_width(self._auto_width, num_trials)
        while not self._fits(self._auto_width, num_trials) and self._auto_width > 1:
            self._auto_width //= 2
        return self._auto_width

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
            storage.write_spec(directory, {**spec, "num_trials": count})
        return True

    def _spec(self, points: plan.Points, width: int, *, fingerprints: bool) -> dict[str, Any]:
        spec = plan.make_spec(
            work=self._work,
            trial=self._trial,
            points=points,
            num_trials=0,
            num_seeds=self._num_seeds,
            eval_every=self._eval_every,
            independent=self._independent,
            keep=self._keep,
            key=self._key,
            width=width,
            shapes=self._shapes,
        )
        if fingerprints or self._executor is not None or processes.current() is not None:
            if not self._fingerprints:
                self._fingerprints = {
                    "data": plan.fingerprint_data(self._work.data),
                    "program": plan.fingerprint_program(self._whole, *self._arguments),
                }
            spec |= self._fingerprints
        return spec

    def engine(self, width: int, num_blocks: int) -> execute.Engine:
        """The engine for blocks of this width, made for a study of about so many blocks."""
        num_devices = self._mesh.shape[devices.TRIALS_AXIS]
        wanted = execute.blocks_per_device(width, num_blocks, num_devices)
        if width in self._one_place:
            wanted = 1
        engine = self._engines.get(width)
        # Another number of places is another program: worth it only for a much longer study.
        crowded = width in self._one_place and engine is not None and engine.blocks_per_device > 1
        if engine is None or crowded or wanted > _MUCH_LONGER * engine.blocks_per_device:
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
        before: Mapping[int, dict[str, np.ndarray]],
    ) -> study.Study:
        """Trains whatever is missing of the first `num_trials` trials."""
        spec = {**spec, "num_trials": num_trials}
        blocks = plan.blocks_of(num_trials, self._num_seeds, width)
        done = dict(before)
        steps = width * self._trial.num_steps
        with (
            processes.together() as group,
            signals.stop_requests(_where_finished_is(directory)) as stop,
        ):
            if group is not None:
                group.agree(spec)
            if directory is not None:
                if group is not None:
                    group.check_shared(directory)
                _write_spec(directory, spec)
                done |= finished.read(directory, {block.index for block in blocks} - set(done))
            shared = self._worker is not None
            keeper = resume.Keeper(stop, directory, self._checkpoint_seconds, shared)
            keeper.sweep(set(done))
            missing = [block for block in blocks if block.index not in done]
            if missing:
                self._check_fits(width, num_trials)
            show = self._progress and (group is None or group.index == 0)
            with Progress(show, self._work.name, len(missing), steps) as progress:
                for batch in self._finish(missing, points, width, spec, directory, keeper):
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
        like = {k: getattr(self._shapes, k) for k in ("params", "model_state")} if kept else None
        extend = None
        if points.space is not None:

            def extend(total: int) -> study.Study:
                return self._train(points, total, width, spec, directory, done)

        def replay_run(
            record: study.Study, trial: int, seed: int, start: int, stop: int, per_layer: bool
        ) -> Any:
            block = plan.blocks_of(trial + 1, self._num_seeds, width)[seed - self._num_seeds]
            engine = self.engine(width, 1)
            program = replay.Replayer(engine, self._workload, trial % width, per_layer)
            return program.run(record, block, points, trial, start, stop)

        return study.study_from_blocks(
            spec,
            [done[block.index] for block in blocks],
            weights_like=like,
            extend=extend,
            replay=replay_run,
        )

    def _finish(
        self,
        missing: Sequence[plan.Block],
        points: plan.Points,
        width: int,
        spec: Mapping[str, Any],
        directory: str | os.PathLike[str] | None,
        keeper: resume.Keeper,
    ) -> Iterator[finished.Finished]:
        """Trains blocks here, or has them trained, and yields them once they are stored."""
        group = processes.current()
        num_blocks = -(-len(missing) // self._num_seeds)
        if group is not None:
            engine = self.engine(width, -(-num_blocks // group.size))
            return group.train(engine, missing, points, directory, keeper)
        if self._worker is not None and directory is not None:
            engine = self.engine(width, -(-num_blocks // self._worker[1]))
            return workers.train(engine, missing, points, directory, self._worker, keeper)
        if self._executor is None:
            engine = self.engine(width, num_blocks)
            return finished.store(directory, engine.run(missing, points, keeper))
        batches = remote.train(
            self._executor,
            missing,
            points,
            spec=spec,
            train_blocks=lambda blocks, points: self.engine(width, 1).run(blocks, points),
            make_payload=lambda: remote.pack(
                _rebuild, {**self._recipe, "trials_per_block": width}, self._key, spec
            ),
            check=keeper.check,
            where=_where_finished_is(directory),
        )
        return finished.store(directory, batches)


def _where_finished_is(directory: str | os.PathLike[str] | None) -> str:
    """The end of a message when a study stops before it is whole."""
    if directory is None:
        return "Nothing is stored without directory=."
    return f"What is finished is stored in {str(directory)!r}: the same call continues."


def _rebuild(**recipe: Any) -> tuple[remote.TrainBlocks, dict[str, Any]]:
    """What trains a study's blocks in a worker, and its spec."""
    runner = StudyRunner(**recipe, progress=False)
    width = recipe["trials_per_block"]
    points, _ = plan.make_points(recipe["points_like"], None, recipe["key"])
    spec = runner._spec(points, width, fingerprints=True)
    return runner.engine(width, 1).run, spec


def _check_places(mesh: Any, executor: Any, worker: Any) -> None:
    """Raises when it was said in two ways where trials are trained."""
    if executor is not None:
        remote.check_executor(executor)
    group = processes.current()
    places = {"executor": executor is not None, "worker": worker is not None}
    places["a job of several processes (jax.distributed)"] = group is not None
    if executor is not None:
        places["mesh"] = mesh is not None
    named = [name for name, given in places.items() if given]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} exclude each other: each says where trials are trained."
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
