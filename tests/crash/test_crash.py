"""Real runs that are killed, and bits that flip: nothing is lost, nothing is read wrong."""

import shutil
import signal

import jax
import pytest

from playbook_optax.runner import signals
from tests.crash import flips, kills


def cache():
    """Where the other tests keep compiled programs."""
    return jax.config.jax_compilation_cache_dir


@pytest.mark.slow
def test_small_runs_and_their_files(tmp_path):  # 57, 60, 71, 75, 76
    harness = kills.Harness("small", tmp_path, cache(), seed=1)
    # The first to be killed is one whose saves are damaged as well.
    flips.train("small", tmp_path / "study-0", cache(), stop_inside=True)
    shutil.copytree(tmp_path / "study-0", tmp_path / "stopped")
    harness.run(2)
    assert harness.counts["in training"] == 2
    finished = flips.files_of_finished(tmp_path / "whole")
    stopped = flips.files_of_stopped(tmp_path / "stopped", tmp_path / "copies")
    for files in (finished, stopped):
        for count in flips.flip(files, 300).values():
            assert set(count) == {"seen"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "long"])
def test_a_hundred_kills_lose_nothing(tmp_path, kind):
    harness = kills.Harness(kind, tmp_path, cache())
    harness.run(100)
    assert harness.counts["in training"] == 100
    assert harness.counts["left an unfinished write"] > 0
    assert harness.counts["left a save inside a block"] > 0


@pytest.mark.slow
def test_a_hundred_thousand_flipped_bits_are_seen(tmp_path):
    files = flips.trained_files(tmp_path, cache())
    counts = flips.flip(files, 100_000)
    assert sum(count["seen"] for count in counts.values()) == 100_000


def test_ctrl_c_keeps_its_exit_status(capfd):
    # Python gives it for KeyboardInterrupt itself, and for no class derived from it.
    with pytest.raises(KeyboardInterrupt) as raised, signals.stop_requests("Here."):
        signal.raise_signal(signal.SIGINT)
    assert type(raised.value) is KeyboardInterrupt
    assert str(raised.value) == "Interrupted. Here."
    capfd.readouterr()
