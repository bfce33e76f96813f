"""What ends or saves a run in trouble: lost ranks, signals, drift, numbers that are not finite, and memory."""

from adabatch.guards.drift import RanksDrifted
from adabatch.guards.left_out import EXIT_NO_UPDATES, UpdatesLeftOut
from adabatch.guards.preemption import EXIT_PREEMPTED, Preemption
from adabatch.guards.watchdog import EXIT_RANK_LOST, RankLost, Watchdog

__all__ = [
    "EXIT_NO_UPDATES",
    "EXIT_PREEMPTED",
    "EXIT_RANK_LOST",
    "Preemption",
    "RankLost",
    "RanksDrifted",
    "UpdatesLeftOut",
    "Watchdog",
]
