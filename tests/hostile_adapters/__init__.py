"""Adapters that somebody made to do harm, or that were damaged: seeded, as many as wanted.

`PYTHONPATH=src:tests python -m hostile_adapters --cases 10000` runs the long form (`make fuzz`).
"""
