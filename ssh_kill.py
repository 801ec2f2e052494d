"""Ending a command, and sending it a signal: programs for `/bin/sh` on the other side. Pure: a process id in, text out.

PID stands for the process id of the command's shell. It leads a process group of its own under OpenSSH; where it
does not (dropbear), the shell and what descends from it are meant, since the group is the connection's. An init that
reaps late, or never as in many containers, leaves zombies that `kill -0` still finds, so `/proc` is looked at.

What sudo started leads a group of its own where sudo gave it a terminal. Else it is in the group that sudo leads, and
all of that is meant but sudo itself: that would pass each signal on, so that the command gets it twice, and how it
ends tells how the command did. A sudo that stopped with its command is woken to tell that.
"""

from typing import Literal

Signal = Literal["INT", "TERM", "KILL", "HUP"]


def ending(pid: int, *, through_sudo: bool = False) -> str:
    """Return the program that ends a command: TERM, KILL after two seconds, and a look whether anything is left.

    It prints the signal that did it, and after that the ids of processes that neither has ended; `gone` when there
    was nobody.
    """
    return (_members(through_sudo) + _END).replace("PID", str(pid))


def signalling(pid: int, signal: Signal, *, through_sudo: bool = False) -> str:
    """Return the program that sends a signal to the whole command; it prints the signal if there was anybody."""
    send = f"for p in $t; do kill -s {signal} -- $p 2>/dev/null && sent={signal}; done; echo $sent\n"
    if signal == "KILL":
        send += "wake\n"
    return (_members(through_sudo) + send).replace("PID", str(pid))


def _members(through_sudo: bool) -> str:
    return _GROUP + (_BESIDE_SUDO if through_sudo else "") + _REACH


_GROUP = """
stat_of() {
  { read -r s <"$1"; } 2>/dev/null || return
  p=${1#/proc/}; p=${p%/stat}; s=${s##*) }
}
t= parent= led=
if stat_of /proc/PID/stat; then set -- $s; parent=$2 g=$3
else g=$(ps -o pgid= -p PID 2>/dev/null); fi
"""

_BESIDE_SUDO = """[ "$parent" != "$g" ] || led=$g
"""

_REACH = """reach() {
  if [ "$(($g + 0))" -eq PID ]; then t=-PID; return; fi
  if [ -n "$led" ]; then t=; else t=${t:-PID}; fi
  more=1
  while [ -n "$more" ]; do
    more=
    for f in /proc/[0-9]*/stat; do
      stat_of "$f" || continue
      set -- $s
      case " $t $led " in *" $p "*) continue ;; esac
      if [ "$3" = "$led" ]; then t="$t $p"
      elif [ -z "$led" ]; then case " $t " in *" $2 "*) t="$t $p" more=1 ;; esac; fi
    done
  done
}
wake() { [ -z "$led" ] || kill -s CONT "$led" 2>/dev/null; }
reach
"""
"""`reach` sets `t` to whom `kill` is to reach: the group, or single processes, with those that have come since."""

_END = """alive() {
  if ! [ -e /proc/self/stat ]; then kill -s 0 -- $t 2>/dev/null && echo PID; return; fi
  reach
  case $t in
    -*) set -- /proc/[0-9]*/stat ;;
    *) set --; for p in $t; do set -- "$@" "/proc/$p/stat"; done ;;
  esac
  for f do
    stat_of "$f" || continue
    set -- $s
    case $1 in Z|X) continue ;; esac
    case $t in -*) [ "$t" = "-$3" ] || continue ;; esac
    echo "$p"
  done
}
any() {
  for p do
    ! stat_of "/proc/$p/stat" || case $s in [ZX]*) ;; *) return 0 ;; esac
  done
  return 1
}
gone() {
  left=$(alive)
  for i in $1; do
    [ -n "$left" ] || return 0
    sleep 0.1 2>/dev/null || sleep 1
    any $left || left=$(alive)
  done
  [ -z "$(alive)" ]
}
tens='1 2 3 4 5 6 7 8 9 10'
if [ -z "$(alive)" ]; then echo gone; exit; fi
kill -s TERM -- $t 2>/dev/null
if gone "$tens $tens"; then echo TERM; exit; fi
reach
kill -s KILL -- $t 2>/dev/null
wake
if gone "$tens"; then echo KILL; exit; fi
echo KILL $(alive)
"""
