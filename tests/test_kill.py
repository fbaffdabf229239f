"""A run killed at any instant goes on to the same weights and the same R, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_killed_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    driver = Path(__file__).parent / "kill_driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(driver.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 12
    assert all(verdict is True for verdict in report.values()), (report, done.stderr[-3000:])
