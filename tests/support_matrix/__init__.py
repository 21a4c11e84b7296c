"""The support matrix: kinds of layers and of quantization × operations, each cell run on a tiny model.

`make matrix` runs all cells and writes `outcomes.json` and, from it, `docs/support-matrix.md`;
`tests/test_support_matrix.py` runs them again and compares. A new kind is a `Subject` in `layers.py` or
`quantizations.py`, a new operation a function in `operations.py`.
"""
