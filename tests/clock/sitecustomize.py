"""Read at the start of a Python process whose PYTHONPATH names this folder: its clock follows a file.

The file that TEST_CLOCK names holds how many seconds the clock is ahead of the true one. Monotonic time and waiting
stay true.
"""

import os
import threading
import time
from pathlib import Path

import time_machine


def _follow(told: Path, clock: time_machine.Traveller) -> None:
    true_time = time_machine.escape_hatch.time.time
    last = ""
    while True:
        if (ahead := told.read_text()) != last:
            clock.move_to(true_time() + float(ahead))
            told.with_suffix(".seen").write_text(ahead)
            last = ahead
        time.sleep(0.02)


if named := os.environ.get("TEST_CLOCK"):
    travelling = time_machine.travel(time.time(), tick=True).start()
    threading.Thread(target=_follow, args=(Path(named), travelling), daemon=True).start()
