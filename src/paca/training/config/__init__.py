"""The YAML of a run, read and checked before anything heavy is loaded."""
