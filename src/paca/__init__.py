"""PaCA, Partial Connection Adaptation: fine-tune at the speed and memory of the frozen model.

Importing this package makes PaCA a method that PEFT knows::

    import paca, peft
    model = peft.get_peft_model(model, paca.PacaConfig(r=16))
"""

from importlib.metadata import version

from paca.config import PacaConfig
from paca.errors import PacaError
from paca.hotswap import hotswap_adapter
from paca.lean import make_lean, undo_lean
from paca.refresh import refresh
from paca.registration import register
from paca.tuner import PacaModel

register(PacaConfig, PacaModel)

__version__ = version("paca-tuning")
__all__ = ["PacaConfig", "PacaError", "PacaModel", "hotswap_adapter", "make_lean", "refresh", "undo_lean"]
