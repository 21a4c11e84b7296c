"""What people see of a run: figures, report, cards, and the page of all runs."""
