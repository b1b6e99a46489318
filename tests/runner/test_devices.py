"""Where compiled programs are kept, and what a processor is called."""

import pathlib

import jax
import pytest

import playbook_optax as pbx
from playbook_optax.runner import devices


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


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
