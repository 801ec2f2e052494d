"""A client whose own address changes under its connections. Run in a network namespace of its own (`unshare --net`).

Prints the address that the server sees at first, what came of a command that ran meanwhile and after how many seconds
that was known, and the address that the server sees then.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import make_server, nobody_cancels, wait_for
from ssh_commands import Commands
from ssh_pool import Pool

OLD, NEW = "127.0.0.2", "127.0.0.3"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def become(address: str) -> None:
    """Take an address, and speak to 127.0.0.1 from it."""
    ip("address", "add", f"{address}/32", "dev", "lo")
    ip("route", "replace", "local", "127.0.0.1", "dev", "lo", "table", "local", "src", address)


def main(folder: Path) -> None:
    ip("link", "set", "lo", "up")
    ip("address", "delete", "127.0.0.1/8", "dev", "lo")
    ip("address", "add", "127.0.0.1/32", "dev", "lo")
    become(OLD)
    server = make_server(folder)
    pool = Pool(server.settings())
    commands = Commands(pool, server.settings())

    def run(command: str) -> tuple[str, str]:
        result = commands.run(server.target, command, cancelled=nobody_cancels, timeout=120)
        return result.status, result.stdout.partition(" ")[0]

    def run_meanwhile() -> None:
        told["meanwhile"] = run("echo begun >> meanwhile; sleep 60")

    told: dict[str, object] = {"before": run("echo $SSH_CONNECTION")}
    waiting = threading.Thread(target=run_meanwhile)
    waiting.start()
    wait_for((server.home / "meanwhile").exists)
    become(NEW)
    ip("address", "delete", f"{OLD}/32", "dev", "lo")
    began = time.monotonic()
    waiting.join()
    told["seconds"] = time.monotonic() - began
    told["after"] = run("echo $SSH_CONNECTION")
    told["begun"] = (server.home / "meanwhile").read_text()
    pool.close()
    server.stop()
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
