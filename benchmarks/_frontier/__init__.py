"""The parts of ``frontier.py``: workloads, runs and their store, the search for settings, frontiers and the report."""
