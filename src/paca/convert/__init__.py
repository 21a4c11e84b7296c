"""Adapters for other programs, and from them."""
