"""Breaks the package in small ways, one at a time, and asks the tests whether they notice.

`python -m tests.mutation` copies package and tests to a temporary directory, where each mutation of
`mutations.MUTATIONS` is made in turn and the tests that it names are run. A mutation that no test
notices has survived: either a test is missing, or the reason stands beside it in the list.
"""

import dataclasses
import importlib.util
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
# For the tests of one mutation, of which one that waits for ever has noticed, and for all at first.
SECONDS = 120
SECONDS_OF_ALL = 3600
MEMORY_BYTES = 12 * 2**30


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One small fault.

    Attributes:
      name: says what is broken.
      file: below the package.
      old: text that occurs once in the file.
      new: what takes its place.
      tests: files or names of tests, as pytest takes them, below `tests`.
      survives: why no test notices, for those few; "" otherwise.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""

    def applied(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
          ValueError: the old text is not there exactly once, so that the list has to be mended.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"mutation {self.name!r}: its old text occurs {count} times in {self.file}"
            )
        return text.replace(self.old, self.new)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutation.

    Attributes:
      mutation: the mutation.
      killed: whether a test noticed.
      told: the test that did, or what else happened.
      seconds: how long the tests took.
    """

    mutation: Mutation
    killed: bool
    told: str
    seconds: float


class Workplace:
    """A copy of package and tests.

    Args:
      place: an empty folder.
    """

    def __init__(self, place: pathlib.Path) -> None:
        self.place = place
        for name in ("playbook_optax", "tests"):
            shutil.copytree(ROOT / name, place / name)
        shutil.copy(ROOT / "pyproject.toml", place)
        (ROOT / ".pytest_cache" / "jax").mkdir(parents=True, exist_ok=True)
        (place / ".pytest_cache").mkdir()
        # Compiled programs of the tests, which most mutations leave as they are.
        (place / ".pytest_cache" / "jax").symlink_to(ROOT / ".pytest_cache" / "jax")

    def pytest(self, tests: tuple[str, ...], seconds: float = SECONDS) -> tuple[int, str]:
        """Runs tests; the exit status, -1 if they took too long, and what they print."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:randomly",
        ]
        command += [f"tests/{one}" for one in tests]
        # Python compares bytecode and source by the second.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.place)}
        process = subprocess.Popen(
            command,
            cwd=self.place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_bound_memory,
        )
        try:
            shown, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return -1, f"waited for more than {seconds:.0f} s"
        return process.returncode, shown

    def run(self, mutation: Mutation) -> Outcome:
        """Makes the mutation, runs its tests, and takes it back."""
        path = self.place / "playbook_optax" / mutation.file
        text = path.read_text()
        compiled = pathlib.Path(importlib.util.cache_from_source(str(path)))
        compiled.unlink(missing_ok=True)
        began = time.monotonic()
        path.write_text(mutation.applied(text))
        try:
            status, shown = self.pytest(mutation.tests)
        finally:
            path.write_text(text)
        failed = [line for line in shown.splitlines() if line.startswith(("FAILED", "ERROR"))]
        told = failed[0] if failed else (shown.strip().splitlines() or [""])[-1]
        # Less than 0 is a signal, or too long; 1 is a test that failed. An error of usage is ours.
        if status > 1 and not _broke_the_import(shown):
            raise RuntimeError(f"mutation {mutation.name!r}: pytest ended with {status}:\n{shown}")
        return Outcome(mutation, status != 0, told[:160], time.monotonic() - began)


def _bound_memory() -> None:
    """What a fault allocates without bound must fail, and not the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _broke_the_import(shown: str) -> bool:
    return "error during collection" in shown or "ImportError while loading conftest" in shown


def check(mutations: tuple[Mutation, ...]) -> None:
    """Raises where a mutation cannot be made, before any is tried.

    Raises:
      ValueError: every mutation whose old text is not there exactly once, or whose tests are not.
    """
    wrong = []
    for one in mutations:
        try:
            one.applied((ROOT / "playbook_optax" / one.file).read_text())
        except (OSError, ValueError) as error:
            wrong.append(str(error))
        for test in one.tests:
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            if not path.is_file() or f"def {name.partition('[')[0]}" not in path.read_text():
                wrong.append(f"mutation {one.name!r}: there is no test {test}")
    names = [one.name for one in mutations]
    wrong += [
        f"mutation {name!r} occurs twice" for name in {n for n in names if names.count(n) > 1}
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def run_all(place: pathlib.Path, mutations: tuple[Mutation, ...]) -> list[Outcome]:
    """Tries mutations and prints what becomes of each.

    Args:
      place: an empty folder.
      mutations: the mutations.

    Returns:
      An outcome for each.

    Raises:
      RuntimeError: the tests fail without any mutation.
    """
    check(mutations)
    workplace = Workplace(place)
    everything = tuple(dict.fromkeys(test for one in mutations for test in one.tests))
    status, shown = workplace.pytest(everything, SECONDS_OF_ALL)
    if status != 0:
        raise RuntimeError(f"the tests fail without a mutation:\n{shown[-4000:]}")
    outcomes = []
    for one in mutations:
        outcome = workplace.run(one)
        outcomes.append(outcome)
        word = "killed  " if outcome.killed else "SURVIVED"
        print(f"{word} {outcome.seconds:5.1f} s  {one.name}: {outcome.told}", flush=True)
    survivors = [one.mutation for one in outcomes if not one.killed]
    share = 1 - len(survivors) / max(len(outcomes), 1)
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} killed, {share:.0%}.")
    for one in survivors:
        print(f"survived: {one.name}: {one.survives or 'NO REASON GIVEN'}")
    return outcomes
