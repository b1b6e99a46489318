"""Workers that are killed, frozen and restarted at random: the bits of an undisturbed run."""

import json
import os
import subprocess
import sys

import pytest

from tests.crash import chaos


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_chaos_changes_no_bit():  # 57, 72, 78, 79, 80
    pytest.importorskip("distributed")
    paths = os.pathsep.join(map(str, (chaos.ROOT, chaos.ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.chaos", "--minutes", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        cwd=chaos.ROOT,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("Every study got whole")
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(found) == 2
    for counts in found:
        assert counts["studies"] > 0
        assert counts["killed"] > 0
        assert counts["frozen"] > 0
