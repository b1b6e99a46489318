"""Settings of every test: warnings are errors, ranks never promote silently, seeds are fixed."""

import os
import pathlib
import signal
import tempfile

import hypothesis
import jax
import matplotlib

# A parent in the background of a shell ignores Ctrl-C, which its children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests, and the processes that some of them start, train the same tiny programs: each is
# compiled once. Those processes read the settings from their environment.
_CACHE = {
    "jax_compilation_cache_dir": str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in _CACHE.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("repeatable")

# The command line keeps compiled programs: not in the cache of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "playbook-optax-tests")
