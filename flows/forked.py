"""Desks that share their imports: a rehearsal has many on one machine, and each would take seconds to import the same.

Imported by the process that all desks of a rehearsal are copied from (multiprocessing's fork server): what is imported here is there.
A desk of its own machine is ``python -m flows.desk`` and knows nothing of this.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import fedmat.telemetry  # noqa: F401  before anything that phones home is imported
from fedmat.federation import site
from fedmat.training import trainer
from flows import desk
from flows.child import PR_SET_PDEATHSIG

trainer.warm_up()
__all__ = ["main", "site"]


def main(home: Path) -> None:
    """Is a desk for the party at ``home``; ends with the process it was copied from."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.setsid()  # Ctrl-C belongs to whoever started the rehearsal, who then ends all desks
    (home / "run").mkdir(parents=True, exist_ok=True, mode=0o700)
    log = os.open(home / "run" / "desk.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    desk.main(home, forked=True)
