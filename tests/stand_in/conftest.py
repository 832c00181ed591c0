"""Programs that run over the stand-in driver, each in a process of its own; skipped where it can't be built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stand_in_driver.build import UnavailableError, cuda_build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def stand_in():
    """Call it with the driver's flags and a program here with its arguments: what that prints as JSON in the end."""
    try:
        cuda_build()
    except UnavailableError as reason:
        pytest.skip(str(reason))

    def run(flags, program, *arguments, **variables):
        command = [sys.executable, "-m", "stand_in_driver", *flags, "python", str(HERE / program), *arguments]
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        for told in ("missing", "refused", "has no value"):
            lines = [line for line in done.stderr.splitlines() if line.startswith("stand_in_driver: " + told)]
            assert not lines, lines
        return json.loads(done.stdout.splitlines()[-1])

    return run
