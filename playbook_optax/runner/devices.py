"""The devices that a study runs on."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from playbook_optax import _checks

# Whether somebody has said where compiled programs are kept.
_cache_decided = False

TRIALS_AXIS = "trials"
DATA_AXIS = "data"


@_checks.named_arguments
def use_cpu_cores(n: int | None = None) -> int:
    """Makes each CPU core a JAX device, so that trials run side by side on a CPU.

    Call it before any array exists. One device per core was worth 1.5 to 2 times on two cores;
    more devices than cores change bits and cost time.

    Args:
      n: number of devices; the cores that this process may use if None.

    Returns:
      The number of devices.

    Raises:
      ValueError: `n` is not a positive integer.
      RuntimeError: JAX has started its backend already, with another number of devices.

    Example:
      >>> import playbook_optax as pbx
      >>> pbx.use_cpu_cores(2)  # doctest: +SKIP
      2

    Source: playbook, "Where can I find an implementation of quasi-random search?" (trials of a
    quasi-random study are independent and can run in parallel).
    """
    n = num_cores() if n is None else n
    n = _checks.check_count("n", n)
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:
        if len(jax.local_devices(backend="cpu")) == n:
            return n
        raise RuntimeError(
            f"use_cpu_cores({n}) came too late: JAX has started with "
            f"{len(jax.local_devices(backend='cpu'))} CPU device(s). Call it right after the "
            "imports, before any array is made."
        ) from error
    return n


@_checks.named_arguments
def use_compilation_cache(
    directory: str | os.PathLike[str] | Literal[False] | None = None,
) -> Path | None:
    """Keeps compiled programs on disk, so that a process starts where an earlier one compiled.

    It is JAX's own persistent cache; a directory that is set already (by
    ``JAX_COMPILATION_CACHE_DIR`` or ``jax.config``) stays. Studies call this before they compile,
    where the directory can be written, unless it was called with False before or
    ``PLAYBOOK_OPTAX_COMPILATION_CACHE`` is ``off``.

    Args:
      directory: where; a folder of the user's cache directory, one for each kind of processor,
        if None; False keeps nothing on disk unless JAX itself was told to.

    Returns:
      The directory, or None if there is none.

    Example:
      >>> import playbook_optax as pbx
      >>> pbx.use_compilation_cache("/tmp/programs")  # doctest: +SKIP
      PosixPath('/tmp/programs')

    Source: playbook, "Deciding how long to train when training is compute-bound" (a study's time
    is for training).
    """
    global _cache_decided
    _cache_decided = True
    already = jax.config.values["jax_compilation_cache_dir"]
    if already is not None:
        return Path(already)
    if directory is False:
        return None
    directory = _cache_folder() if directory is None else directory
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX asks once in a process whether there is one.
    compilation_cache.reset_cache()
    return Path(directory)


def use_default_cache() -> None:
    """`use_compilation_cache`, if nobody has decided otherwise and its folder can be written."""
    switch = os.environ.get("PLAYBOOK_OPTAX_COMPILATION_CACHE", "on").lower()
    if _cache_decided or switch in ("off", "0", "false", "no"):
        return
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        use_compilation_cache()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "playbook-optax" / f"jax-{jax.__version__}-{_processor()}"


def _processor() -> str:
    """Names this kind of processor: programs compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    told = "\n".join([platform.machine(), *(kind or lines[:1])])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def num_cores() -> int:
    """The CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def trial_mesh(mesh: Any) -> jax.sharding.Mesh:
    """The mesh over which trials, and perhaps each trial's batches, are sharded.

    Args:
      mesh: None for all local devices, or a `jax.sharding.Mesh` of one axis (trials) or two
        (trials, and examples of a batch), however they are called.

    Returns:
      A mesh with the axis ``trials``, and ``data`` if there was a second one.

    Raises:
      ValueError: `mesh` is not a mesh with one or two axes.
    """
    if mesh is None:
        return jax.sharding.Mesh(np.asarray(jax.local_devices()), (TRIALS_AXIS,))
    if not isinstance(mesh, jax.sharding.Mesh):
        raise _checks.ArgumentTypeError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}."
        )
    if len(mesh.axis_names) > 2:
        raise ValueError(
            "mesh must have one axis, over which trials are sharded, or a second one for the "
            f"examples of a batch, got {mesh.axis_names}."
        )
    return jax.sharding.Mesh(mesh.devices, (TRIALS_AXIS, DATA_AXIS)[: len(mesh.axis_names)])


def free_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a program may take on each local device of a mesh, as far as the system tells.

    Args:
      mesh: the devices.

    Returns:
      On an accelerator nine tenths of what its allocator has; on a CPU, whose devices share one
      memory, the available memory of the machine or control group, divided among them. None if it
      is not known.
    """
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(0.9 * (limit - stats.get("bytes_in_use", 0)))
    found = [size for size in (_available_memory(), _control_group_memory()) if size is not None]
    return min(found) // len(mesh.local_devices) if found else None


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    size = sizes.get("MemAvailable")
    return int(size[0]) * 1024 if size else None


def _control_group_memory() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / f"memory.{name}" for name in ("max", "current"))
        return int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # No control group, or one without a limit ("max").
        return None
