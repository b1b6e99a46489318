"""What is trained and how, as one object; what is asked stands in the call."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

from playbook_optax import _checks
from playbook_optax.runner import devices, processes, progress, remote, workers
from playbook_optax.trials.stepper import MakeOptimizer, MakeSchedule
from playbook_optax.trials.workload import Workload, WorkloadLike

R = TypeVar("R")

TIMED = "timed"


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """A model, its optimizer, and how they are trained: what all studies of one model share.

    Hold on to it, and give it in the place of ``workload, make_optimizer`` to `run_study` and to
    every procedure: the compiled programs live as long as it does. Without one, a process keeps the
    programs that it used last, and finds them again by what the functions are made of.

    Attributes:
      workload: a `Workload`, or a function of the point that gives one.
      make_optimizer: ``make_optimizer(point)`` returns any Optax transformation.
      make_schedule: ``make_schedule(point, num_steps)`` returns a schedule, which reaches
        `make_optimizer` as ``point["learning_rate"]``. `num_steps` is a traced number, so that runs
        of any length share a program; a function that needs a Python number gets one, and has a
        program for each length.
      fixed: hyperparameters that are the same in all trials, name to number: data of the program
        like those that are searched, and no part of a study's points.
      trials_per_block: width of a block: 1 trains one trial after another inside the program, which
        is the faster on a CPU above about 1 MFLOP a step. Chosen by backend and size if None;
        ``"timed"`` compiles and times one, some and all trials side by side, for about half a
        second each, and takes the fastest. The width decides bits, so that a study is repeated
        exactly with the one that its spec records; a stored study keeps it.
      mesh: a mesh to shard trials over; all local devices if None. A second axis, whatever its
        name, cuts the batches of each trial, for trials that need several devices. Of a mesh over
        several processes, each uses its own devices.
      executor: a PEP 3148 executor, such as `concurrent.futures.ProcessPoolExecutor` with spawned
        workers or ``client.get_executor()`` of a Dask client; its workers train the blocks, this
        process stores them, compared with what was asked for. A worker that is killed costs the
        blocks it was training, which are trained again.
      executor_timeout_seconds: how long to wait while none of the executor's workers answers, as
        when one is frozen. Then the blocks that are waited for are sent again, for others to train,
        with a warning that names them, and after three times the study stops with
        `RuntimeError`. If None, ten times as long as the longest task so far, at least ten
        minutes; before the first block has come there is a warning and no limit.
      worker: ``(i, n)``: this process is worker i of n that make the same call with the same
        `directory`. It trains its share and then whatever is still missing, so that the study gets
        whole though other workers die.
      accept_changed_program: continue a stored study though the program that trains it is not the
        one that began it: you vouch that it is the same study.
      checkpoint_seconds: with a directory, how long to train between saves of blocks that are not
        finished; a killed run loses no more than that.
      progress: say on standard error what is done: a line for each stage, study and decision, and
        a bar on a terminal and in a notebook where `rich` is installed.

    Raises:
      ValueError: a bad argument, or two places to train in.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import playbook_optax as pbx
      >>> workload = pbx.Workload(
      ...     name="square", init=lambda key: ({"w": jnp.ones(2)}, {}),
      ...     loss=lambda p, s, b, k: ((p["w"] ** 2).sum(), (s, {})), batch=lambda d, k, i: (),
      ...     evaluate=lambda p, s, d: {"valid/loss": (p["w"] ** 2).sum()}, objective="valid/loss")
      >>> trainer = pbx.Trainer(workload, lambda point: pbx.sgd(point["learning_rate"]))
      >>> space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-3, 0.4, scale="log")})
      >>> short = pbx.run_study(
      ...     trainer, space, num_trials=8, num_steps=20, eval_every=10, key=jax.random.key(0))
      >>> long = pbx.run_study(  # Nothing is compiled again.
      ...     trainer, space, num_trials=4, num_steps=90, eval_every=30, key=jax.random.key(1))
      >>> short.data["valid/loss"].shape, long.data["valid/loss"].shape
      ((8, 3), (4, 4))

    Source: playbook, "Choosing the initial configuration" (model, optimizer and pipeline are chosen
    before the experiments).
    """

    workload: WorkloadLike
    make_optimizer: MakeOptimizer
    make_schedule: MakeSchedule | None = None
    _: dataclasses.KW_ONLY
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trials_per_block: int | str | None = None
    mesh: jax.sharding.Mesh | None = None
    executor: concurrent.futures.Executor | None = None
    executor_timeout_seconds: float | None = None
    worker: tuple[int, int] | None = None
    accept_changed_program: bool = False
    checkpoint_seconds: float = 60.0
    progress: bool = True
    # Programs that studies have used, kept from being forgotten.
    _used: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.workload, Workload) and not callable(self.workload):
            raise _checks.ArgumentTypeError(
                "workload must be a pbx.Workload or a function of the point, got "
                f"{self.workload!r}."
            )
        if not callable(self.make_optimizer):
            raise _checks.ArgumentTypeError(
                "make_optimizer must be a function of the point that returns an Optax "
                f"transformation, got {self.make_optimizer!r}."
            )
        for name, value in self.fixed.items():
            _checks.check_number(f"fixed[{name!r}]", value)
        if isinstance(self.trials_per_block, str):
            _checks.check_choice("trials_per_block", self.trials_per_block, (TIMED,))
            if self.executor is not None:
                raise ValueError(
                    f"trials_per_block={TIMED!r} times this machine, and the executor's workers "
                    "may be others; give a number."
                )
        elif self.trials_per_block is not None:
            _checks.check_count("trials_per_block", self.trials_per_block)
        _checks.check_flag("accept_changed_program", self.accept_changed_program)
        _checks.check_number("checkpoint_seconds", self.checkpoint_seconds, at_least=0.0)
        if self.executor_timeout_seconds is not None:
            _checks.check_number(
                "executor_timeout_seconds", self.executor_timeout_seconds, above=0.0
            )
        if self.worker is not None:
            workers.check_worker(self.worker)
        devices.trial_mesh(self.mesh)
        self.check_places()

    def replace(self, **changes: Any) -> Trainer:
        """This trainer with other attributes; the programs are shared.

        Args:
          **changes: attributes.

        Returns:
          A trainer.
        """
        return dataclasses.replace(self, **changes)

    def with_fixed(self, fixed: Mapping[str, Any]) -> Trainer:
        """This trainer with more fixed hyperparameters, or others.

        Args:
          fixed: name to number.

        Returns:
          A trainer.
        """
        return self.replace(fixed={**self.fixed, **fixed})

    def how(self) -> dict[str, Any]:
        """All but workload, optimizer and schedule, as arguments by name."""
        return {name: getattr(self, name) for name in HOW}

    @property
    def programs(self) -> dict[Hashable, Any]:
        """The programs that studies of this trainer, and of those made from it, have used."""
        return self._used

    def check_places(self) -> None:
        """Raises when it was said in two ways where trials are trained.

        Raises:
          ValueError: such as an executor inside a job of several processes.
        """
        if self.executor is not None:
            remote.check_executor(self.executor)
        group = processes.current()
        places = {"executor": self.executor is not None, "worker": self.worker is not None}
        places["a job of several processes (jax.distributed)"] = group is not None
        if self.executor is not None:
            places["mesh"] = self.mesh is not None
        named = [name for name, given in places.items() if given]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} exclude each other: each says where trials are trained."
            )


_FIELDS = tuple(f.name for f in dataclasses.fields(Trainer) if f.name != "_used")
_WHAT = ("workload", "make_optimizer", "make_schedule")
HOW = tuple(name for name in _FIELDS if name not in _WHAT)
"""What `Trainer` takes beside model, optimizer and schedule."""


def takes_trainer(function: Callable[..., R]) -> Callable[..., R]:
    """Lets a function of a `Trainer` be called with ``workload, make_optimizer`` as well.

    Args:
      function: takes a trainer first.

    Returns:
      A function that takes in its place a trainer, or a workload, ``make_optimizer`` and, by name,
      any other attribute of `Trainer`; an unknown argument raises a `TypeError` that names the
      nearest known one.
    """
    own = list(inspect.signature(function).parameters.values())[1:]
    kinds = inspect.Parameter
    first = [
        kinds("workload", kinds.POSITIONAL_OR_KEYWORD, annotation="WorkloadLike | Trainer"),
        kinds("make_optimizer", kinds.POSITIONAL_OR_KEYWORD, annotation="MakeOptimizer"),
    ]
    known = [*_FIELDS, *(parameter.name for parameter in own)]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{function.__qualname__}() has no argument {name!r}: "
                    f"{_checks.nearest(name, known)}"
                )
        how = {name: kwargs.pop(name) for name in ("make_schedule", *HOW) if name in kwargs}
        rest = list(args)
        workload = rest.pop(0) if rest else kwargs.pop("workload")
        if isinstance(workload, Trainer):
            if how or "make_optimizer" in kwargs:
                twice = ", ".join(["make_optimizer"] * ("make_optimizer" in kwargs) + list(how))
                raise TypeError(
                    f"{function.__qualname__}() got a Trainer, which says already what and how to "
                    f"train, and {twice} beside it; use trainer.replace(...)."
                )
            return tell(workload, *rest, **kwargs)
        missing = not rest and "make_optimizer" not in kwargs
        if missing:
            raise TypeError(f"{function.__qualname__}() needs make_optimizer beside the workload.")
        make_optimizer = rest.pop(0) if rest else kwargs.pop("make_optimizer")
        # None stands for what was not given, as it does in a Trainer.
        given = {name: value for name, value in how.items() if value is not None}
        return tell(Trainer(workload, make_optimizer, **given), *rest, **kwargs)

    def tell(trainer: Trainer, *args: Any, **kwargs: Any) -> R:
        with progress.telling(trainer.progress, getattr(trainer.workload, "name", "workload")):
            return function(trainer, *args, **kwargs)

    keywords = [kinds("how", kinds.VAR_KEYWORD, annotation="Any")]
    told = inspect.signature(function).return_annotation
    signature = inspect.Signature([*first, *own, *keywords], return_annotation=told)
    wrapper.__signature__ = _checks.readable(signature)  # type: ignore[attr-defined]
    return wrapper
