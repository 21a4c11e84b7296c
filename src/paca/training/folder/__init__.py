"""What lies in the folder of a run, and whether it may go on there."""
