"""PaCA, Partial Connection Adaptation: fine-tune by training a few columns of each weight in place.

Importing this package makes PaCA a method that PEFT knows::

    import paca, peft
    model = peft.get_peft_model(model, paca.PacaConfig())
"""

from __future__ import annotations

from importlib.metadata import version

# These two before the rest of ours, and in this order: where another thread is importing one of them, this waits for
# the whole of it. (`transformers` takes another module's place at the end of its import: who imports names from it
# while it is not done, as `peft` would, finds none of them.)
from paca.messages.import_notes import hold_import_notes  # isort: skip

with hold_import_notes():
    import transformers  # noqa: F401  # isort: skip
    import peft  # noqa: F401  # isort: skip

from paca import data as data  # its own parts are loaded on first use
from paca.columns.factored import FactoredAdamW
from paca.config import PacaConfig
from paca.lean import make_lean, undo_lean
from paca.lean.float32_products import float32_products
from paca.messages.errors import PacaError
from paca.pretrained.learning_rate import learning_rate
from paca.pretrained.tied_weights import untie_embeddings
from paca.tuner import forks as forks  # tells Python what to do when a process is forked
from paca.tuner.calibration import select
from paca.tuner.hotswap import hotswap_adapter
from paca.tuner.model import PacaModel
from paca.tuner.refresh import refresh
from paca.tuner.registration import register
from paca.tuner.rotation.callback import RotateColumns
from paca.tuner.rotation.rotate import rotate, set_trained_columns, trained_columns

__version__ = version("paca-tuning")
__all__ = [
    "FactoredAdamW",
    "PacaConfig",
    "PacaError",
    "PacaModel",
    "RotateColumns",
    "float32_products",
    "hotswap_adapter",
    "learning_rate",
    "make_lean",
    "refresh",
    "rotate",
    "select",
    "set_trained_columns",
    "trained_columns",
    "undo_lean",
    "untie_embeddings",
]

register(PacaConfig, PacaModel)
