"""Memory-lean blocks: the stock modules of transformers with forwards that keep less for the backward pass."""

from paca.lean.conversion import is_lean, make_lean, undo_lean

__all__ = ["is_lean", "make_lean", "undo_lean"]
