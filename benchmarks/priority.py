"""Priority for what is timed."""

from __future__ import annotations

import os


def quiet() -> None:
    """Asks for priority over the machine's other work; without the right to it, nothing changes."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    except (OSError, AttributeError):
        return
