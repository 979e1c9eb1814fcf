"""The baseline that HAD must beat: the teacher's nucleotide distributions, without masking.

    L = a · T² · KL(p_t^T ‖ p_s^T) + (1 − a) · CE

After caduceus-distill (Open-Athena/caduceus-distill, the one public distillation of a genomic language
model; ideas only, its code has no licence). Its teacher reads characters; ours reads k-mers, so that its
distribution over k-mers is summed up to one over A, C, G, T at each character. In caduceus-distill the hard
loss predicts characters that the student sees, a copying task; here it predicts masked ones, which a second
pass of the student reads masked. `compat = "reference"` copies. Its cosine term on embeddings is left out:
this is the row without features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.losses import forward_kl
from stillhouse.core.train import Losses, Step

from ..config import DistillConfig
from ..masking import GroupMask, nothing_masked, seeded_mask
from ..student import Encoder, RcEquivariant, RcHead
from ..teacher import Teacher
from ..tokenizers import CharacterTokenizer
from ._had import window_mean
from ._view import View, view_of


class LogitDistiller:
    """Trains a student with a nucleotide head on the teacher's distributions: one role, "student".

    Batches are windows, uint8 [B, L].

    Args:
        encoder: the student.
        teacher: it sees whole windows.
        config: `temperature`, `soft_weight`, `compat`, and `mask_ratio` for the hard loss.
        seed: of the masks (≥ 0).
    """

    def __init__(
        self,
        encoder: Encoder | RcEquivariant,
        teacher: Teacher,
        config: DistillConfig,
        *,
        seed: int = 0,
    ) -> None:
        self.encoder, self.teacher, self.config, self.seed = encoder, teacher, config, seed
        self.characters = CharacterTokenizer()
        self.head: nn.Module = (
            RcHead(encoder.width) if isinstance(encoder, RcEquivariant) else nn.Linear(encoder.width, 4)
        )
        self.parts = nn.ModuleDict({"encoder": encoder, "head": self.head})

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student and its nucleotide head."""
        return {"student": self.parts}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {"teacher": self.teacher.network}

    def roles(self, step: int) -> Sequence[str]:
        """Always the student."""
        return ("student",)

    def loss(self, role: str, batch: Tensor, step: Step) -> Losses:
        """Soft and hard term of a batch."""
        device = next(self.encoder.parameters()).device
        view = view_of(batch, self.characters, self.teacher.tokenizer)
        if self.config.compat == "none":
            key = (self.seed << 40) + step.index
            mask = seeded_mask(view.tokens, self.config.mask_ratio, tokenizer=self.teacher.tokenizer, key=key)
        else:
            mask = nothing_masked(view.tokens, tokenizer=self.teacher.tokenizer)
        return self.losses(view.to(device), mask.to(device))

    def losses(self, view: View, mask: GroupMask) -> Losses:
        """The terms of a batch.

        Args:
            view: the batch.
            mask: characters of the hard loss; not looked at with `compat = "reference"`.
        """
        soft, letters = self.config.soft_weight, mask.letters
        reference = self.config.compat == "reference"
        second = soft < 1 and not reference
        ids = view.ids
        if second:
            ids = torch.cat([ids, ids.masked_fill(mask.characters, self.characters.mask_id)])
        attend = torch.cat([view.attend, view.attend]) if second else view.attend
        logits = self.head(self.encoder(ids, attend=attend))
        plain = logits[: len(view.ids)]
        answer = self.teacher.nucleotide_log_probs(view.tokens).to(logits.device)
        kl = forward_kl(
            plain[letters],
            answer[letters],
            temperature=self.config.temperature,
            scale_t2=not reference or soft < 1,
            reduction="none",
        )
        terms = {"kl": window_mean(kl, letters)}
        weights = {"kl": soft}
        if soft < 1:
            asked = letters if reference else mask.characters
            seen = plain if reference else logits[len(view.ids) :]
            hard = F.cross_entropy(seen[asked].float(), view.nucleotides[asked], reduction="none")
            terms["hard"], weights["hard"] = window_mean(hard, asked), 1 - soft
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Losses(total, terms, weights=weights, task="hard" if "hard" in terms else None)
