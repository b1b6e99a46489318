"""Runs every benchmark and stores what they print: `python -m benchmarks [--quick]`."""

import json
import pathlib
import platform
import sys

import jax

import playbook_optax as pbx
from benchmarks import layouts, norms, samplers, studies
from benchmarks.first_answer.__main__ import main as first_answer
from benchmarks.speed.__main__ import main as speed

RESULTS = pathlib.Path(__file__).parent / "results"


def main():
    quick = "--quick" in sys.argv
    # First, while this process has neither a device nor threads of its own; stored apart.
    speed(["--quick"] if quick else [])
    first_answer(["--quick"] if quick else [])
    pbx.use_cpu_cores()
    report = {
        "machine": platform.machine(),
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "versions": {"jax": jax.__version__, "playbook_optax": pbx.__version__},
    }
    for module in (layouts, norms, samplers, studies):
        print(f"== {module.__name__}")
        report[module.__name__.removeprefix("benchmarks.")] = module.run(quick=quick)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{report['device'].lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
