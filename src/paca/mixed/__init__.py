"""Batches in which each sample has an adapter of its own."""
