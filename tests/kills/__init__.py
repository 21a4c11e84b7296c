"""kill -9 while a run, a merge or an export is on its way. `make kills` does it hundreds of times."""
