"""A burst of messages for the real app while no replica runs: `benchmarks.burst`."""

import json
import subprocess
import sys

import pytest

MESSAGES, REPLICAS = 24, 4


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_burst_wakes_all_replicas_in_one_step_whatever_the_reading_and_they_stop_when_all_is_done() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.burst",
        f"--messages={MESSAGES}",
        f"--replicas={REPLICAS}",
        "--look-back=5",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=570)
    found = json.loads(done.stdout.splitlines()[-1])
    for answers in ("exact", "late", "absent", "wrong"):
        up = found[answers]["steps"][: found[answers]["steps"].index(REPLICAS) + 1]
        # The first message has had Serve start one.
        assert up in ([REPLICAS], [1, REPLICAS]), (answers, found)
        assert found[answers]["steps"][-1] == 0
