"""A machine that moves to another network: its address is gone, and its connections with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import network_change


def test_address_that_changes_under_a_command_is_noticed_and_the_next_call_runs_from_the_new_one(
    tmp_path: Path,
) -> None:
    assert os.getuid() == 0, "this test makes a network namespace: run it as root"
    command = ["unshare", "--net", sys.executable, network_change.__file__, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["before"] == ["exited", network_change.OLD]
    assert told["meanwhile"] == ["lost", ""]
    assert told["seconds"] < 15.5
    assert told["begun"] == "begun\n"
    assert told["after"] == ["exited", network_change.NEW]
