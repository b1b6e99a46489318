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
# Many tests train the same tiny program: it is compiled once.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
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
