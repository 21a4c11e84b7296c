"""What the README.md beside an adapter says about loading it: nothing else tells those who get the folder."""

from __future__ import annotations

INSTALL = (
    "It needs the Python package `paca-tuning`, which is not on PyPI yet; the `paca` there is another package. Install "
    "it\nfrom the folder of its source: `pip install ./paca`. PEFT up to 0.21 knows PaCA through `import paca` alone, "
    "and\nwithout it raises `KeyError: 'PACA'`.\n\n"
)
IMPORT = "import paca  # makes PaCA known to PEFT\n"
EXPORT = (
    "`paca export path/to/this/folder --to peft --output FOLDER` writes one that loads there, or names the layer for "
    "which there is none."
)
LACKS = (
    "That PaCA adapts linear layers alone, gives all layers one rank and one scale, chooses columns at random, and has "
    "no\nbatches of several adapters. (Read in its source: no release with it was on PyPI when this was written.)"
)
HOW_TO_LOAD = f"""## How to load this PaCA adapter

{INSTALL}```python
{IMPORT}from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

PEFT 0.22 has a PaCA of its own, which may lack what this adapter uses. {EXPORT}
{LACKS}
"""
