"""Processes that are ended at random times, by SIGKILL too, leave whole files; `make faults` ends more of them."""

import os
from pathlib import Path

import pytest
from processes import run_script

COUNT = int(os.environ.get("PFA_TEST_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
def test_processes_that_are_ended_leave_whole_files(name, tmp_path):
    end = run_script(Path(__file__).parent / "killed_writers.py", name, COUNT, tmp_path, timeout=300 + 5 * COUNT)
    assert end.returncode == 0, end.stderr[-3000:]
    print(end.stdout)
