"""How a student of characters learns from a teacher of k-mers.

    distiller = HadDistiller(encoder, decoder, teacher, config.distill)
    Trainer(config.train, out=folder).fit(distiller, loader, config.optim)     # batches: uint8 [B, L]

`HadDistiller` is HAD with its switches; `LogitDistiller` the baseline without masking.
"""

from __future__ import annotations

from ._had import HadDistiller as HadDistiller
from ._logit import LogitDistiller as LogitDistiller
from ._view import View as View
from ._view import view_of as view_of
