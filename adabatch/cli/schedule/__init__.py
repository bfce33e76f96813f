"""``adabatch schedule``: compare, transfer, refine and extend learning-rate schedules."""
