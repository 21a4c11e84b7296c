"""Measuring fine-tuning methods against each other: speed, memory, and how far a budget reaches."""
