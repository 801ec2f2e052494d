"""The system report: one remote script, one parser.

The script prints what each system has, in sections that begin with `@@ NAME`; the parser is pure and makes null of
what is missing or garbled. Linux with GNU tools or BusyBox, also in a container where /proc is thin; macOS and the
BSDs where it can be told.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

from pydantic import BaseModel, Field

from schemas import Inlined
from settings import Target
from ssh_output import visible

SCRIPT: Final = r"""
exec 2>/dev/null
LC_ALL=C; export LC_ALL
proc=${proc:-/proc}
echo '@@ uname'; uname -n; uname -s; uname -r; uname -m
echo '@@ date'; date +%s
case $(uname -s) in
Linux)
  for f in uptime loadavg meminfo mounts; do echo "@@ $f"; cat "$proc/$f"; done
  echo '@@ stat'; grep '^cpu' "$proc/stat"
  echo '@@ cpuinfo'; grep -iE '^(model name|hardware|model|cpu model|cpu)[[:space:]]*:' "$proc/cpuinfo"
  echo '@@ os-release'; cat /etc/os-release || cat /usr/lib/os-release
  echo '@@ df'; df -P -k -l || df -P -k
  ;;
*)
  echo '@@ sw_vers'; sw_vers
  echo '@@ sysctl'
  for k in hw.ncpuonline hw.ncpu hw.model machdep.cpu.brand_string hw.memsize hw.physmem64 hw.physmem \
    hw.pagesize kern.boottime vm.loadavg vm.swapusage kern.cp_time vm.stats.vm.v_free_count \
    vm.stats.vm.v_inactive_count vm.stats.vm.v_laundry_count; do
    v=$(sysctl -n "$k") && echo "$k=$v"
  done
  echo '@@ vm_stat'; vm_stat
  echo '@@ uvmexp'; vmstat -s
  echo '@@ swap'; swapinfo -k || swapctl -lk
  echo '@@ mount'; mount
  echo '@@ df'; df -P -k -l || df -P -k
  ;;
esac
exit 0
"""

_PSEUDO = {
    *(
        "autofs",
        "bpf",
        "binfmt_misc",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devfs",
        "devpts",
        "devtmpfs",
    ),
    *(
        "efivarfs",
        "fdescfs",
        "fusectl",
        "hugetlbfs",
        "linprocfs",
        "mqueue",
        "nsfs",
        "overlay",
        "proc",
        "procfs",
    ),
    *("pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs", "tmpfs", "tracefs"),
}


class OSInfo(BaseModel):
    """The operating system."""

    name: str | None = None
    version: str | None = None
    kernel: str | None = None
    architecture: str | None = None


class CPUInfo(BaseModel):
    """The processors."""

    model: str | None = None
    cores: int | None = Field(None, description="logical ones")
    usage_percent: float | None = Field(None, description="since the last look, or else since boot")


class Memory(BaseModel):
    """Memory or swap."""

    total_bytes: int
    used_bytes: int
    available_bytes: int


class Disk(BaseModel):
    """A mounted file system."""

    mount: str
    device: str
    filesystem: str | None
    total_bytes: int
    used_bytes: int
    free_bytes: int


class SystemInfo(BaseModel):
    """The state of a machine."""

    hostname: str
    os: Annotated[OSInfo, Inlined()]
    uptime_seconds: float | None = None
    load_average: list[float] | None = None
    cpu: Annotated[CPUInfo, Inlined()]
    memory: Annotated[Memory, Inlined()] | None = None
    swap: Annotated[Memory, Inlined()] | None = None
    disks: list[Annotated[Disk, Inlined()]]

    def text(self) -> str:
        """Return a line for each fact, with a bar for what can be used up: a report of 80 columns."""
        facts = [
            ("host", self.hostname),
            ("system", " ".join(part for part in (self.os.name, self.os.version) if part)),
            ("kernel", " ".join(part for part in (self.os.kernel, self.os.architecture) if part)),
            ("uptime", _duration(self.uptime_seconds)),
            ("load", " ".join(f"{load:.2f}" for load in self.load_average or ())),
            ("cpu", _cpu_text(self.cpu)),
            ("memory", _memory_text(self.memory)),
            ("swap", _memory_text(self.swap)),
            *(("disk", _disk_text(disk)) for disk in self.disks),
        ]
        return visible("\n".join(f"{name:7} {fact}" for name, fact in facts if fact))


@dataclass(frozen=True)
class CPUTimes:
    """Ticks since boot, of all processors together."""

    busy: int
    total: int


class RunScript(Protocol):
    """Runs a /bin/sh program on a target and returns what it prints."""

    def __call__(self, target: Target, text: str, *, cancelled: Callable[[], None]) -> str:
        """Raises SSHError."""


class SystemReports:
    """Reports on targets; remembers each one's processor times until the next look. Thread-safe."""

    def __init__(self, run: RunScript) -> None:
        self._run = run
        self._last: dict[Target, CPUTimes] = {}
        self._last_lock = threading.Lock()

    def report(self, target: Target, *, cancelled: Callable[[], None]) -> SystemInfo:
        """Look at a target. Raises SSHError."""
        output = self._run(target, SCRIPT, cancelled=cancelled)
        with self._last_lock:
            info, times = parse(output, self._last.get(target))
            if times is not None:
                self._last[target] = times
        return info


def parse(output: str, last: CPUTimes | None = None) -> tuple[SystemInfo, CPUTimes | None]:
    """Return what the script's output says, and the processor times for the next look."""
    sections = _sections(output)
    sysctl = dict(line.partition("=")[::2] for line in sections.get("sysctl", []))
    hostname, system, kernel, architecture = (sections.get("uname", []) + [""] * 4)[:4]
    times = _cpu_times(sections, sysctl)
    name, version = _os_name(sections, system, kernel)
    info = SystemInfo(
        hostname=hostname,
        os=OSInfo(name=name, version=version, kernel=kernel or None, architecture=architecture or None),
        uptime_seconds=_uptime(sections, sysctl),
        load_average=_load(sections, sysctl),
        cpu=CPUInfo(
            model=_cpu_model(sections, sysctl),
            cores=_cores(sections, sysctl),
            usage_percent=_usage(times, last),
        ),
        memory=_linux_memory(sections, "Mem")
        or _mac_memory(sections, sysctl)
        or _bsd_memory(sections, sysctl),
        swap=_linux_memory(sections, "Swap") or _mac_swap(sysctl) or _bsd_swap(sections),
        disks=list(_disks(sections)),
    )
    return info, times


def _sections(output: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in output.split("\n"):
        if line.startswith("@@ "):
            current = sections.setdefault(line[3:].strip(), [])
        elif line:
            current.append(line)
    return sections


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d{1,18}(?:\.\d{1,9})?", text)]


def _number(text: str | None) -> int | None:
    numbers = _numbers(text or "")
    return int(numbers[0]) if numbers else None


def _os_name(sections: dict[str, list[str]], system: str, kernel: str) -> tuple[str | None, str | None]:
    release = {
        key: value.strip().strip("\"'")
        for key, _, value in (line.partition("=") for line in sections.get("os-release", []))
    }
    if release.get("NAME"):
        return release["NAME"], release.get("VERSION") or release.get("VERSION_ID") or None
    mac = dict(re.split(r":\s*", line, maxsplit=1) for line in sections.get("sw_vers", []) if ":" in line)
    if mac.get("ProductName"):
        return mac["ProductName"], mac.get("ProductVersion")
    return system or None, (kernel or None) if system not in ("", "Linux") else None


def _uptime(sections: dict[str, list[str]], sysctl: dict[str, str]) -> float | None:
    for line in sections.get("uptime", [])[:1]:
        numbers = _numbers(line)
        return numbers[0] if numbers else None
    boot = re.search(r"(?:sec = )?(\d{1,12})", sysctl.get("kern.boottime", ""))
    now = _number("".join(sections.get("date", [])[:1]))
    return float(max(0, now - int(boot[1]))) if boot and now is not None else None


def _load(sections: dict[str, list[str]], sysctl: dict[str, str]) -> list[float] | None:
    line = " ".join(sections.get("loadavg", [])[:1]) or sysctl.get("vm.loadavg", "")
    numbers = _numbers(line)[:3]
    return numbers if len(numbers) == 3 else None


def _cores(sections: dict[str, list[str]], sysctl: dict[str, str]) -> int | None:
    count = sum(bool(re.match(r"cpu\d", line)) for line in sections.get("stat", []))
    return count or _number(sysctl.get("hw.ncpuonline")) or _number(sysctl.get("hw.ncpu"))


def _cpu_model(sections: dict[str, list[str]], sysctl: dict[str, str]) -> str | None:
    found = {
        key.strip().lower(): value.strip()
        for key, _, value in (line.partition(":") for line in reversed(sections.get("cpuinfo", [])))
    }
    models = [found.get(key) for key in ("model name", "cpu model", "hardware", "cpu")]
    models.append(found.get("model") if not (found.get("model") or "").isdecimal() else None)
    models += [sysctl.get("machdep.cpu.brand_string"), sysctl.get("hw.model")]
    return next((model for model in models if model), None)


def _cpu_times(sections: dict[str, list[str]], sysctl: dict[str, str]) -> CPUTimes | None:
    for line in sections.get("stat", []):
        if line.startswith("cpu "):
            ticks = [int(tick) for tick in _numbers(line[4:])[:8]]
            if len(ticks) >= 4:
                return CPUTimes(sum(ticks) - sum(ticks[3:5]), sum(ticks))
    ticks = [int(tick) for tick in _numbers(sysctl.get("kern.cp_time", ""))]
    return CPUTimes(sum(ticks[:-1]), sum(ticks)) if len(ticks) >= 5 else None


def _usage(now: CPUTimes | None, last: CPUTimes | None) -> float | None:
    if now is None or now.total == 0:
        return None
    if last is None or now.total <= last.total or now.busy < last.busy:
        last = CPUTimes(0, 0)
    return round(min(100.0, 100 * (now.busy - last.busy) / (now.total - last.total)), 1)


def _linux_memory(sections: dict[str, list[str]], kind: str) -> Memory | None:
    kilobytes = {
        key: _number(value) or 0
        for key, _, value in (line.partition(":") for line in sections.get("meminfo", []))
    }
    if f"{kind}Total" not in kilobytes:
        return None
    total = kilobytes[f"{kind}Total"]
    if kind == "Swap":
        free = kilobytes.get("SwapFree", 0)
    else:
        old = sum(kilobytes.get(key, 0) for key in ("MemFree", "Buffers", "Cached"))
        free = kilobytes.get("MemAvailable", old)
    return _memory(total * 1024, free * 1024)


def _memory(total: int, available: int) -> Memory:
    available = min(max(0, available), total)
    return Memory(total_bytes=total, used_bytes=total - available, available_bytes=available)


def _mac_memory(sections: dict[str, list[str]], sysctl: dict[str, str]) -> Memory | None:
    total = _number(sysctl.get("hw.memsize"))
    pages = {
        key.strip(): _number(value) or 0
        for key, _, value in (line.partition(":") for line in sections.get("vm_stat", []))
    }
    if not total or "Pages free" not in pages:
        return None
    size = re.search(r"page size of (\d{1,9})", " ".join(sections["vm_stat"][:1]))
    free = sum(pages.get(f"Pages {kind}", 0) for kind in ("free", "inactive", "speculative", "purgeable"))
    return _memory(total, free * (int(size[1]) if size else 4096))


def _mac_swap(sysctl: dict[str, str]) -> Memory | None:
    amounts = dict(re.findall(r"(total|free) = (\d{1,12}\.\d\d)M", sysctl.get("vm.swapusage", "")))
    if "total" not in amounts:
        return None
    return _memory(int(float(amounts["total"]) * 2**20), int(float(amounts.get("free", 0)) * 2**20))


def _bsd_memory(sections: dict[str, list[str]], sysctl: dict[str, str]) -> Memory | None:
    total = _number(sysctl.get("hw.physmem64")) or _number(sysctl.get("hw.physmem"))
    if not total:
        return None
    page = _number(sysctl.get("hw.pagesize")) or 4096
    counts = [_number(value) or 0 for key, value in sysctl.items() if key.startswith("vm.stats.vm.")]
    if not counts:
        counts = [
            _number(line) or 0
            for line in sections.get("uvmexp", [])
            if re.fullmatch(r"\s*\d+ pages (free|inactive)", line)
        ]
    return _memory(total, sum(counts) * page) if counts else None


def _bsd_swap(sections: dict[str, list[str]]) -> Memory | None:
    rows = [row for line in sections.get("swap", []) if len(row := line.split()) >= 4 and row[1].isdecimal()]
    rows = [row for row in rows if row[0] != "Total" and row[2].isdecimal()]
    if "swap" not in sections or not sections["swap"]:
        return None
    total, used = (sum(int(row[column]) * 1024 for row in rows) for column in (1, 2))
    return _memory(total, total - used)


def _disks(sections: dict[str, list[str]]) -> Iterator[Disk]:
    kinds = _filesystems(sections)
    seen: set[str] = set()
    for line in sections.get("df", []):
        match = re.fullmatch(r"(.+?)\s+(\d{1,18})\s+(\d{1,18})\s+(-?\d{1,18})\s+(?:\d+%|-)\s+(/.*)", line)
        if match is None:
            continue
        device, mount = match[1], match[5]
        kind = kinds.get(mount)
        pseudo = kind in _PSEUDO or device.startswith("/dev/loop") or match[2] == "0"
        if mount in seen or (pseudo and mount != "/"):
            continue
        seen.add(mount)
        total, used, free = (max(0, int(match[n])) * 1024 for n in (2, 3, 4))
        yield Disk(
            mount=mount, device=device, filesystem=kind, total_bytes=total, used_bytes=used, free_bytes=free
        )


def _filesystems(sections: dict[str, list[str]]) -> dict[str, str]:
    """Return the type of each mount point, from /proc/mounts or mount(8) of the BSDs and macOS."""
    kinds: dict[str, str] = {}
    for line in sections.get("mounts", []):
        fields = line.split(" ")
        if len(fields) >= 3:
            kinds[re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])] = fields[2]
    for line in sections.get("mount", []):
        if bsd := re.fullmatch(r".+? on (/.*?) (?:type (\w+)\b.*|\((\w+).*)", line):
            kinds[bsd[1]] = bsd[2] or bsd[3]
    return kinds


def _size(size: int) -> str:
    amount, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        if amount < 1024 or unit == units[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    days, rest = divmod(int(seconds), 86_400)
    hours, minutes = rest // 3600, rest % 3600 // 60
    return f"{days} d {hours} h {minutes} min" if days else f"{hours} h {minutes} min"


def _bar(used: float, total: float) -> str:
    """Draw how much of something is in use, as ten characters and in percent."""
    share = min(1.0, used / total) if total else 0.0
    return f"[{'#' * round(10 * share):-<10}] {100 * share:3.0f} %"


def _cpu_text(cpu: CPUInfo) -> str:
    busy = _bar(cpu.usage_percent, 100) if cpu.usage_percent is not None else ""
    cores = f"{cpu.cores} cores" if cpu.cores is not None else ""
    return "  ".join(part for part in (busy, cores, cpu.model) if part)


def _memory_text(memory: Memory | None) -> str:
    if memory is None:
        return ""
    if not memory.total_bytes:
        return "none"
    bar = _bar(memory.used_bytes, memory.total_bytes)
    sizes = f"{_size(memory.used_bytes)} of {_size(memory.total_bytes)}"
    return f"{bar}  {sizes}, {_size(memory.available_bytes)} available"


def _disk_text(disk: Disk) -> str:
    bar = _bar(
        disk.used_bytes, disk.used_bytes + disk.free_bytes
    )  # as df: what only root may use is not counted
    kind = f" ({disk.filesystem})" if disk.filesystem else ""
    return f"{bar}  {_size(disk.used_bytes)} of {_size(disk.total_bytes)}  {disk.mount}{kind}"
