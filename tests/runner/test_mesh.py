"""Trials over devices, and batches over a second axis, on eight forced host devices."""

import os
import subprocess
import sys

import pytest
import tiny_workloads as tiny

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import jax, jax.numpy as jnp, numpy as np
import playbook_optax as pbx
pbx.use_cpu_cores(8)
import tiny_workloads as tiny

def study(mesh, workload=None, **arguments):
    found = pbx.run_study(workload or tiny.mlp(), tiny.momentum, tiny.SPACE, num_trials=7,
                          num_steps=40, eval_every=10, key=jax.random.key(0), progress=False,
                          trials_per_block=2, mesh=mesh, **arguments)
    return found.data["valid/loss"].values

def mesh(*shape):
    names = ("trials", "data")[:len(shape)]
    return jax.sharding.Mesh(np.array(jax.devices()[:int(np.prod(shape))]).reshape(shape), names)

alone = study(mesh(1))
np.testing.assert_array_equal(study(mesh(3)), alone)
# A batch that is cut is summed in another order: close, and the same however trials are spread.
cut = study(mesh(1, 4))
np.testing.assert_allclose(cut, alone, rtol=1e-3)
from playbook_optax.runner.run import StudyRunner
trainer = pbx.Trainer(tiny.mlp(), tiny.momentum, trials_per_block=2, mesh=mesh(2, 4))
runner = StudyRunner(trainer, tiny.SPACE, num_steps=40, eval_every=10, key=jax.random.key(0))
both = runner.run(tiny.SPACE, num_trials=7)
np.testing.assert_array_equal(both.data["valid/loss"].values, cut)
# The program works on shards: gradients are added up over devices.
print("all-reduce" in runner.engine(2, 1).programs.program("advance").as_text())
own = {{"independent": True}}
np.testing.assert_allclose(study(mesh(2, 4), **own), study(mesh(1), **own), rtol=1e-3)

host = pbx.Workload(**{{**vars(tiny.quadratic()), "batch": None, "version": "1",
    "loss": lambda p, s, b, k: (jnp.mean(jnp.sum(b * p["w"] ** 2, axis=1)), (s, {{}})),
    "init": lambda key: ({{"w": jnp.ones(3)}}, {{}}),
    "evaluate": lambda p, s, d: {{"valid/loss": jnp.sum(p["w"] ** 2)}},
    "host_batches": lambda start: (np.full((8, 3), 1 + (start + i) % 5, np.float32)
                                   for i in range(10**6))}})
np.testing.assert_allclose(study(mesh(2, 4), host), study(mesh(1), host), rtol=1e-4)
# Each device is given its quarter of the batches that the host reads, and no more.
fed = StudyRunner(
    pbx.Trainer(host, tiny.momentum, trials_per_block=2, mesh=mesh(2, 4)), tiny.SPACE,
    num_steps=40, eval_every=10, key=jax.random.key(0))
_, _, chunk, _ = next(fed.engine(2, 1)._segments(0, None, 0, 1))
assert chunk.shape == (64, 8, 3)
for shard in chunk.addressable_shards:
    assert shard.data.shape == (64, 2, 3)
    assert shard.index[1].start == 2 * (shard.device.id % 4)

# What has no examples goes whole to each device; so do batches that the axis does not divide.
import warnings
uneven = pbx.Workload(**{{**vars(host), "host_batches": lambda start: (
    {{"x": np.full((6, 3), 1 + (start + i) % 5, np.float32), "scale": np.float32(0.5)}}
    for i in range(10**6)),
    "loss": lambda p, s, b, k: (b["scale"] * jnp.mean(b["x"] * p["w"] ** 2), (s, {{}}))}})
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    whole = study(mesh(2, 4), uneven)
assert ["batches of [6] examples are not cut" in str(one.message) for one in told] == [True], told
np.testing.assert_allclose(whole, study(mesh(1), uneven), rtol=1e-4)
print("done")
"""


@pytest.mark.slow
def test_a_mesh_of_trials_and_one_of_trials_and_data():  # 82
    script = SCRIPT.format(tests=os.path.dirname(tiny.__file__))
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["True", "done"]
