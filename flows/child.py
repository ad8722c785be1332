"""Runs a command that ends when its starter does: ``python flows/child.py PARENT_PID COMMAND...``.

Knows: how Linux tells a process that its parent died. Refuses to know: what it runs. A starter that is killed without
a chance to clean up (``kill -9``, out of memory) leaves no server behind. On other systems it only runs the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(parent: int, command: list[str]) -> None:
    """Replaces this process by ``command``; the request for a death signal outlives the replacement."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            return
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
