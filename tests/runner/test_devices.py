"""Where compiled programs are kept, and what a processor is called."""

import pathlib

import jax
import numpy as np
import pytest
import tiny_workloads as tiny
from jax.experimental.compilation_cache import compilation_cache

import playbook_optax as pbx
from playbook_optax.runner import devices, programs


@pytest.fixture
def unset(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(devices, "_cache_decided", False)
    monkeypatch.delenv("PLAYBOOK_OPTAX_COMPILATION_CACHE", raising=False)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_the_users_cache_directory_by_processor(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = pbx.use_compilation_cache()
    assert found.parent == tmp_path / "playbook-optax"
    assert jax.__version__ in found.name
    assert jax.config.jax_compilation_cache_dir == str(found)
    # What is set already stays.
    assert pbx.use_compilation_cache(tmp_path / "other") == found


def test_a_given_directory(unset, tmp_path):
    assert pbx.use_compilation_cache(tmp_path / "mine") == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def kept():
    devices.use_default_cache()
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_by_default_where_they_can_be(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept() == str(devices._cache_folder())
    assert list(tmp_path.iterdir()) == [tmp_path / "playbook-optax"]


def test_the_switch_of_the_environment(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PLAYBOOK_OPTAX_COMPILATION_CACHE", "off")
    assert kept() is None
    assert list(tmp_path.iterdir()) == []


def test_the_switch_in_a_program(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pbx.use_compilation_cache(False) is None
    assert kept() is None
    assert pbx.use_compilation_cache(tmp_path / "mine") == tmp_path / "mine"
    assert kept() == str(tmp_path / "mine")


def test_where_nothing_can_be_written_nothing_is_kept(unset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept() is None


def test_a_study_that_compiles_keeps_its_programs(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs.forget()
    pbx.run_study(
        tiny.quadratic(),
        tiny.sgd,
        {"learning_rate": np.float32([0.1])},
        num_steps=2,
        eval_every=1,
        key=jax.random.key(0),
        progress=False,
    )
    # The settings of the tests keep small programs as well.
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_processors_differ(monkeypatch):
    def cpuinfo(text):
        class System(type(pathlib.Path())):
            def read_text(self):
                return text

        monkeypatch.setattr(devices, "Path", System)
        return devices._processor()

    one = cpuinfo("model name : A\nflags : avx\ncpu MHz : 1\n")
    assert one == cpuinfo("model name : A\nflags : avx\ncpu MHz : 2\n")
    assert one != cpuinfo("model name : A\nflags : avx avx512f\ncpu MHz : 1\n")


def test_memory_is_read_where_the_system_tells(monkeypatch):
    def told(files):
        class System(type(pathlib.Path())):
            def read_text(self):
                if self.name not in files:
                    raise FileNotFoundError(self)
                return files[self.name]

        monkeypatch.setattr(devices, "Path", System)
        return devices.free_memory(devices.trial_mesh(None))

    info = "MemTotal: 100 kB\nMemAvailable: 50 kB\n"
    assert told({"meminfo": info}) == 50 * 1024
    assert told({"meminfo": info, "memory.max": "max\n", "memory.current": "7\n"}) == 50 * 1024
    assert told({"meminfo": info, "memory.max": "1007\n", "memory.current": "7\n"}) == 1000
    assert told({}) is None
