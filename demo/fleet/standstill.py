"""A child process that stands still."""

from __future__ import annotations

import os
import signal


def stand_still(pid: int) -> None:
    """Returns once no thread of the child ``pid`` runs. A signal alone is only on its way: on a busy machine the
    process answers for some while."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
