"""Background jobs on the remote host: the folder that each lives in, and the programs for `/bin/sh` that work on it.

`~/.cache/ssh-mcp/jobs/NAME` (0700) holds `stdin`, `stdout`, `stderr`, `pid` (process group, runner, when it started)
and, once the command has ended, `status`. The runner is a subshell that belongs to nobody's connection: it outlives
the SSH session, writes down how the command ended, and takes no notice of signals that its group gets. The command
gets them all: INT too, which POSIX lets a shell ignore for good in what it starts with `&` (dash, ash and ksh do). So
their runner is a part of a pipeline whose shell is killed instead of waiting. A Korn shell runs its subshells within
itself, so `/bin/sh` is its runner, and starts the command as `$SHELL -c COMMAND`.

A name begins a job once: the first who makes `~/.cache/ssh-mcp/begun/NAME` does it, and `mkdir` is atomic. That folder
stays for at least a day after the job's own has made room, so whoever comes again with the name learns that it was
begun, and never begins it anew. A job whose stdin did not arrive whole is not begun at all.

Nothing but POSIX `sh` and its usual companions is needed there. Pure: text in, text out; no thread, no connection.
"""

from dataclasses import dataclass
from typing import Literal

from ssh_kill import Signal
from ssh_output import Kept
from ssh_words import quoted

FOLDER = ".cache/ssh-mcp/jobs"

NO_FOLDER, TOO_MANY_JOBS, BEGUN_BEFORE = 3, 4, 5
"""How the program that starts a job ends when it does not."""

_SIGNALS = {
    129: "HUP",
    130: "INT",
    131: "QUIT",
    134: "ABRT",
    137: "KILL",
    139: "SEGV",
    141: "PIPE",
    143: "TERM",
}
_POLLS_A_SECOND = 5

_ALIVE = """\
j="$HOME/FOLDER" b="$HOME/.cache/ssh-mcp/begun"
started_at() {
  if ! [ -e /proc/self/stat ]; then
    ! kill -0 "$1" 2>/dev/null || echo "-$(ps -o lstart= -p "$1" 2>/dev/null | tr -d ' ')"
    return
  fi
  { read -r x <"/proc/$1/stat"; } 2>/dev/null || return
  set -- ${x##*) }
  case $1 in Z|X) ;; *) echo "${20}" ;; esac
}
alive() {
  { read -r g r at since <"$1/pid"; } 2>/dev/null || { [ -d "$1" ] && [ -z "$(find "$1" -prune -mtime +0)" ]; return; }
  [ -n "$at" ] && [ "$(started_at "$r")" = "$at" ]
}
ended() { [ -e "$1/status" ] || ! alive "$1"; }
"""

_PREPARE = (
    _ALIVE
    + """\
umask 077
mkdir -p "$j" "$b" && chmod 700 "$HOME/.cache/ssh-mcp" "$j" "$b" || exit 3
find "$b" -mtime +1 | while IFS= read -r f; do [ "$f" = "$b" ] || rmdir "$f"; done
find "$j" -name status -mtime +6 | while IFS= read -r f; do rm -rf -- "${f%/status}"; done
find "$j" -name pid -mtime +6 | while IFS= read -r f; do
  [ -e "${f%/pid}/status" ] || alive "${f%/pid}" || rm -rf -- "${f%/pid}"
done
room() {
  for old in "$j"/*; do
    set -- "$j"/*
    [ $# -ge 100 ] || [ "$(du -sk "$j" | sed 's/[^0-9].*//')" -gt 1048576 ] || break
    ! ended "$old" || rm -rf -- "$old"
  done
  set -- "$j"/*
  [ $# -lt 100 ]
}
few_run() {
  n=0
  for d in "$j"/*; do ended "$d" || n=$((n + 1)); done
  [ $n -lt 100 ]
}
room || few_run || exit 4  # others that start now may take the room that was made
if ! mkdir "$b/NAME"; then
  [ -d "$b/NAME" ] || exit 3
  exit 5
fi
mkdir "$j/NAME" && cat >"$j/NAME/stdin" || exit 3
[ $(($(wc -c <"$j/NAME/stdin"))) -eq BYTES ] || exit 6
"""
)

_NOTE_PID = (
    _ALIVE
    + """\
echo "$2 $PPID $(started_at "$PPID") $(date +%s)" >"$1/pid.new" && mv -f "$1/pid.new" "$1/pid"
"""
)

_START = """\
/bin/sh -c PREPARE || exit $?
ssh_mcp_job="$HOME/FOLDER/NAME"
[ -z "${ZSH_VERSION-}" ] || unsetopt bg_nice
ssh_mcp_run=RUNNER
ssh_mcp_group=$$
if [ -n "${BASH_VERSION-}${ZSH_VERSION-}" ]; then
( eval "$ssh_mcp_run" ) &
elif [ -n "${KSH_VERSION-}" ]; then
/bin/sh -c KORN sh "$ssh_mcp_run" "$ssh_mcp_job" "$ssh_mcp_group" 2>/dev/null
else
{ ( eval "$ssh_mcp_run" | /bin/sh -c 'kill -s KILL $PPID' ); } 2>/dev/null
fi
echo started"""

_KORN = """\
ssh_mcp_login=yes ssh_mcp_job=$2 ssh_mcp_group=$3
eval "$1" | kill -s KILL $$"""

_RUNNER = """\
exec </dev/null >/dev/null 2>&1
trap : HUP INT QUIT TERM
/bin/sh -c NOTE_PID sh "$ssh_mcp_job" "$ssh_mcp_group"
(
trap - HUP INT QUIT TERM
unset ssh_mcp_job ssh_mcp_run ssh_mcp_group
RUN
) <"$ssh_mcp_job/stdin" >"$ssh_mcp_job/stdout" 2>"$ssh_mcp_job/stderr"
set -- $?
[ "$1" -le 255 ] || set -- $(($1 - 128))
echo "$1 $(date +%s)" >"$ssh_mcp_job/status.new"
mv -f "$ssh_mcp_job/status.new" "$ssh_mcp_job/status"
rm -f "$ssh_mcp_job/stdin"
"""

_LOOK = (
    _ALIVE
    + """\
d="$j/NAME"
[ -d "$d" ] || { echo gone; exit; }
n=0
size() { if [ -e "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; }
tell() {
  f=stdout
  [ -s "$d/$f" ] || f=stderr
  last=$(tail -c 120 "$d/$f" 2>/dev/null | tail -n 1 | tr -d '\\000')
  echo "$(($(size "$d/stdout") + $(size "$d/stderr"))) $last" >&2
}
while [ $n -lt POLLS ] && [ ! -e "$d/status" ] && alive "$d"; do
  [ $((n % 5)) -ne 4 ] || tell
  if sleep 0.2 2>/dev/null; then n=$((n + 1)); else sleep 1; n=$((n + 5)); fi
done
s=running end=$(date +%s) since=$end
if ! alive "$d"; then s=lost; fi
if [ -e "$d/status" ]; then
  read -r s end <"$d/status"
  case "$s$end" in ''|*[!0-9]*) echo damaged; exit ;; esac
fi
{ read -r g r at since <"$d/pid"; } 2>/dev/null
case $since in ''|*[!0-9]*) since=$end ;; esac
parts() {
  rest=$(($1 - $2)) head=0 tail=0
  if [ $rest -lt 0 ]; then rest=0; fi
  head=$rest
  if [ $rest -gt $((2 * BUDGET)) ]; then head=BUDGET tail=BUDGET; fi
  echo "$rest $head $tail"
}
cut_out() { [ "$3" -eq 0 ] || tail -c "+$(($2 + 1))" "$1" | head -c "$3"; }
so=$(size "$d/stdout") se=$(size "$d/stderr")
po=$(parts $so OUT) pe=$(parts $se ERR)
echo "$s $((end - since)) $so $po $se $pe"
for f in stdout stderr; do
  if [ $f = stdout ]; then set -- $so OUT $po; else set -- $se ERR $pe; fi
  cut_out "$d/$f" "$2" "$4"
  cut_out "$d/$f" $(($1 - $5)) "$5"
done
"""
)

_BEGUN = (
    _ALIVE
    + """\
mkdir -p "$b" && chmod 700 "$HOME/.cache/ssh-mcp" "$b" || exit 3
if mkdir "$b/NAME" 2>/dev/null; then echo never; exit; fi
n=0
while [ $n -lt POLLS ]; do
  if [ -e "$j/NAME/pid" ] || [ -e "$j/NAME/status" ]; then echo yes; exit; fi
  if sleep 0.2 2>/dev/null; then n=$((n + 1)); else sleep 1; n=$((n + 5)); fi
done
echo no
"""
)

_REACH = (
    _ALIVE
    + """\
d="$j/NAME"
alive "$d" || { echo ended; exit; }
rows() {
  [ -e /proc/self/stat ] || { ps -A -o pid= -o ppid= -o pgid=; return; }
  for f in /proc/[0-9]*/stat; do
    { read -r x <"$f"; } 2>/dev/null || continue
    p=${f#/proc/}
    set -- ${x##*) }
    case $1 in Z|X) ;; *) echo "${p%/stat} $2 $3" ;; esac
  done
}
members() {
  all=$(rows)
  own=$(echo "$all" | while read -r p pp pg; do if [ "$p" = "$r" ]; then echo "$pg"; fi; done)
  [ "$own" = "$g" ] || g=none
  t=" $r " more=1
  while [ -n "$more" ]; do
    more=
    while read -r p pp pg; do
      case $t in *" $p "*) continue ;; esac
      case "$pg" in "$g") t="$t$p " more=1; continue ;; esac
      case $t in *" $pp "*) t="$t$p " more=1 ;; esac
    done <<ROWS
$all
ROWS
  done
  echo "${t#" $r "}"
}
"""
)

_SIGNAL = (
    _REACH
    + """\
sent=
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
  for p in $(members); do
    if kill -s SIGNAL "$p" 2>/dev/null; then sent=SIGNAL; fi
  done
  case SIGNAL$i in KILL[12]) continue ;; esac  # again, for what was born meanwhile
  [ -z "$sent" ] || break
  alive "$d" || { echo ended; exit; }
  sleep 0.2 2>/dev/null || sleep 1  # it has just begun, and its command not yet
done
echo $sent
"""
)

_END = (
    _REACH
    + """\
gone() {
  for i in $1; do
    t=$(members)
    [ -n "$t" ] || return 0
    if [ -n "$2" ]; then kill -s "$2" -- $t 2>/dev/null; fi
    sleep 0.1 2>/dev/null || sleep 1
  done
  [ -z "$(members)" ]
}
tens='1 2 3 4 5 6 7 8 9 10'
t=$(members)
if [ -z "$t" ]; then echo gone; exit; fi
kill -s TERM -- $t 2>/dev/null
if gone "$tens $tens" ''; then echo TERM; exit; fi
if gone "$tens" KILL; then echo KILL; exit; fi
echo KILL $(members)
"""
)


@dataclass(frozen=True)
class Look:
    """What was seen of a job: how it is, and what its streams said after the bytes that were asked for."""

    status: Literal["running", "exited", "killed", "lost"]
    exit_code: int | None
    signal: str | None
    seconds: int
    sizes: tuple[int, int]
    out: Kept
    err: Kept
    note: str | None = None


def path_of(name: str, stream: Literal["stdout", "stderr"]) -> str:
    """Return where a job's output stands."""
    return f"~/{FOLDER}/{name}/{stream}"


def start(name: str, run: str, stdin_bytes: int) -> str:
    """Return what a POSIX shell evaluates to start `run`, a piece of its own language, as the job `name`.

    It reads the job's stdin to its end, and prints `started`; it ends with NO_FOLDER where there can be none, with
    TOO_MANY_JOBS where a hundred run already, and with BEGUN_BEFORE where that name has begun a job before.
    """
    runner = _RUNNER.replace("NOTE_PID", quoted(_NOTE_PID)).replace("FOLDER", FOLDER)
    text = _START.replace("PREPARE", quoted(_PREPARE)).replace("FOLDER", FOLDER).replace("NAME", name)
    text = text.replace("KORN", quoted(_KORN)).replace("BYTES", str(stdin_bytes))
    return text.replace("RUNNER", quoted(runner.replace("RUN", run)))


def look(name: str, seen: tuple[int, int], seconds: float, budget: int) -> str:
    """Return the program that waits for a job's end, `seconds` at most, and prints what `parsed` reads.

    Each second or so it prints the bytes so far and the last line of output on stderr.
    """
    return _filled(_LOOK, name, POLLS=int(seconds * _POLLS_A_SECOND), BUDGET=budget, OUT=seen[0], ERR=seen[1])


def begun(name: str, seconds: float) -> str:
    """Return the program that tells whether a job has begun: `yes`; `no` when it came to nothing in so many seconds.

    A job that nobody had begun never will from now on: then it prints `never`.
    """
    return _filled(_BEGUN, name, POLLS=int(seconds * _POLLS_A_SECOND))


def signalling(name: str, signal: Signal) -> str:
    """Return the program that sends a signal to the command and what it started; it prints the signal."""
    return _filled(_SIGNAL, name, SIGNAL=signal)


def ending(name: str) -> str:
    """Return the program that ends a job as `ssh_kill.ending` ends a command, and prints what that does.

    It prints `ended` when the job had ended before.
    """
    return _filled(_END, name)


def parsed(data: bytes, budget: int) -> Look | None:
    """Read what `look` printed; None when the job's folder is not there. Raises ValueError for anything else."""
    line, _, rest = data.partition(b"\n")
    words = line.decode("ascii").split()
    if words == ["gone"]:
        return None
    status, seconds, *numbers = words
    so, out_rest, out_head, out_tail, se, err_rest, err_head, err_tail = (int(number) for number in numbers)
    pieces = []
    for length in (out_head, out_tail, err_head, err_tail):
        pieces.append(rest[:length])
        rest = rest[length:]
    code = None if status in ("running", "lost") else int(status)
    signal = _SIGNALS.get(code) if code is not None else None
    return Look(
        status="running"
        if status == "running"
        else "lost"
        if code is None
        else "killed"
        if signal
        else "exited",
        exit_code=code,
        signal=signal,
        seconds=int(seconds),
        sizes=(so, se),
        out=Kept.of(budget, pieces[0], pieces[1], out_rest),
        err=Kept.of(budget, pieces[2], pieces[3], err_rest),
    )


def _filled(program: str, name: str, **values: object) -> str:
    text = program.replace("FOLDER", FOLDER).replace("NAME", name)
    for word, value in values.items():
        text = text.replace(word, str(value))
    return text
