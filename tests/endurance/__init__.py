"""Thousands of steps on a tiny model: memory stays, and the columns are what the deltas say. `make endurance`."""
