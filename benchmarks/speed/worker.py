"""Processes that wait for calls, so that what needs different settings can take turns.

A call is one line of JSON to the worker's standard input, ``{"function": "module:name",
"arguments": {...}}``, and one line back. Whatever the functions print goes to standard error.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import traceback
from typing import Any

from benchmarks.speed import arena

ROOT = pathlib.Path(__file__).parents[2]


class Worker:
    """One process; leaving the context ends it.

    Args:
      devices: CPU devices of JAX, as `pbx.use_cpu_cores` sets them; None leaves JAX as it comes.
      environment: variables on top of this process's.
    """

    def __init__(
        self, devices: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.worker"]
        if devices is not None:
            command += ["--devices", str(devices)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # Several of these processes share one accelerator.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **shared, **(environment or {})},
            text=True,
        )

    def call(self, function: str, **arguments: Any) -> Any:
        """What ``module:name`` returns, called in the worker.

        Raises:
          RuntimeError: it raised, or the worker died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"function": function, "arguments": arguments})
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker died in {function}, with {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{function}({arguments}) failed in its worker:\n{reply['error']}")
        return reply["result"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Answers calls until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": arena.load(request["function"])(**request["arguments"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int)
    wanted = parser.parse_args().devices
    if wanted is not None:
        importlib.import_module("playbook_optax").use_cpu_cores(wanted)
    serve()
