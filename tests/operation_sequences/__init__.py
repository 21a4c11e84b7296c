"""Random sequences of operations on an adapted model, beside a plain float64 model that says what must come out.

`python -m operation_sequences --sequences 2000` (in `tests/`) runs many; the test suite runs some.
"""
