"""Methods compared on one task: many runs of `paca train`, and a page that says what they show."""
