"""Priority for what is timed."""

from __future__ import annotations

import os


def quiet() -> None:
    """Asks for priority over the machine's other work; without the right to it, nothing changes.

    Where Linux groups processes by session (sched_autogroup), priorities count only within a group, and the group has its own:
    that is set by a process that leads a session alone, as contestants do, for it would lift a whole shell with all its jobs.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -15)
        if os.getsid(0) == os.getpid():
            with open("/proc/self/autogroup", "w", encoding="ascii") as group:
                group.write("-15")
    except (OSError, AttributeError):
        return
