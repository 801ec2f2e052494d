"""A Dockerfile carried out without Docker: its stages on throwaway machines, step by step, as they stand in the file.

Known are the instructions that ours uses; any other fails. Base images stand for the Python of this machine.
"""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

from machine import SLEEP, Machine, machine

_HOME = "/home/empty"


@dataclass
class Stage:
    """A stage as far as it is built, and what its image says of how it is run."""

    machine: Machine
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/image/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": _HOME}
    )
    folder: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def run(self, command: str, *, network: bool = False) -> None:
        done = self.machine.run(command, network=network, cwd=self.folder, **self.environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@contextmanager
def built(dockerfile: Path, context: Path) -> Iterator[Stage]:
    """Carry out a Dockerfile with the files of a folder, and give its last stage."""
    ignored = (context / ".dockerignore").read_text().splitlines()
    sent = sorted(name for name in exclude_paths(str(context), ignored) if (context / name).is_file())
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    with ExitStack() as ending:
        for step in DockerfileParser(fileobj=BytesIO(dockerfile.read_bytes())).structure:
            instruction, value = step["instruction"], step["value"]
            if instruction == "FROM":
                stage = _based(ending.enter_context(machine(SLEEP)))
                stages[value.partition(" AS ")[2]] = stage
            elif instruction != "COMMENT":
                assert stage is not None
                _obey(stage, instruction, value, stages, context, sent)
        assert stage is not None
        yield stage


def _based(on: Machine) -> Stage:
    """Give a machine what the image of Python has: `python` and `pip`, and a home without anything."""
    stage = Stage(on)
    uv = Path(sys.executable).with_name("uv")
    stage.run(
        f"mkdir {_HOME} && {uv} venv -q --seed --python /usr/bin/python3 /usr/local/image", network=True
    )
    return stage


def _obey(
    stage: Stage, instruction: str, value: str, stages: dict[str, Stage], context: Path, sent: list[str]
) -> None:
    match instruction:
        case "RUN":
            stage.run(value, network=True)
        case "WORKDIR":
            stage.run(f"mkdir -p {value}")
            stage.folder = value
        case "ENV":
            for word in shlex.split(value):
                name, _, text = word.partition("=")
                stage.environment[name] = text.replace("$PATH", stage.environment["PATH"])
        case "COPY":
            *sources, to = value.split()
            if sources[0].startswith("--from="):
                _copy_from(stages[sources[0].removeprefix("--from=")], sources[1], stage, to)
            else:
                _copy(context, sent, sources, stage, to)
        case "USER":
            stage.user = value
        case "HEALTHCHECK":
            stage.health = json.loads(re.split(r"\bCMD\b", value)[1])
        case "ENTRYPOINT":
            stage.entrypoint = json.loads(value)
        case "CMD":
            stage.arguments = json.loads(value)
        case _:
            assert instruction == "EXPOSE", instruction


def _copy(context: Path, sent: list[str], sources: list[str], stage: Stage, to: str) -> None:
    """Copy files of the context: those that match, and of a folder what is in it."""
    folder = stage.machine.path(f"{stage.folder}/{to}")
    for source in sources:
        found = [name for name in sent if _within(name, source)]
        assert found, f"nothing that is sent matches {source}"
        for name in found:
            place = folder / name.removeprefix(f"{source}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(context / name, place)


def _within(name: str, source: str) -> bool:
    same_depth = name.count("/") == source.count("/")
    return name.startswith(f"{source}/") or (same_depth and fnmatch.fnmatch(name, source))


def _copy_from(source: Stage, what: str, stage: Stage, to: str) -> None:
    place = stage.machine.path(to)
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", source.machine.path(what), place], check=True)
