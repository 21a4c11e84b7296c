"""Training other columns every so many steps, and saving the union of them all."""
