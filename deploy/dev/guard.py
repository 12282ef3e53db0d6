"""Becomes another program that the kernel ends with this program's parent.

`python -I -S guard.py PARENT_PID COMMAND ...`. A child that outlives a killed supervisor would keep its
ports; PR_SET_PDEATHSIG has the kernel send SIGKILL when the parent is gone, and it stays in force over exec.
It is set here, between fork and exec of the real program, and not in a `preexec_fn`, since that is unsafe
in a process with threads. Where there is no such call (macOS), the program simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it went before the call above
        sys.exit("the process that started this one is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
