"""HAD: hybrid architecture distillation by grouped masking (arXiv 2505.20836; its code is not public).

    L       = L_align + λ · L_rec
    L_align = 1/|V| · Σ_{g ∈ V} ‖P(s_g) − t_g‖²             V: visible tokens, s_g: mean of h_i over i ∈ C(g)
    L_rec   = −1/|C(M)| · Σ_{i ∈ C(M)} log p(x_i | visible)     M: masked tokens, C(M): their characters

h are the student's features of a window whose masked characters read [MASK], t the frozen teacher's hidden
states, P a linear map. p comes from a cross-attention decoder over the visible features. Both means are taken
over each window and then over windows, so that gradients do not depend on how a batch is spread over
processes or micro-batches. The paper writes 6|M| for |C(M)|, which is wrong where a token is a single letter
(our reading).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.taps import Projector
from stillhouse.core.train import Losses, Step

from ..config import DistillConfig
from ..masking import GroupMask, seeded_mask
from ..student import Encoder, MaskedDecoder, RcEquivariant
from ..teacher import Teacher
from ..tokenizers import CharacterTokenizer, KmerTokenizer
from ._view import View, view_of


class HadDistiller:
    """Trains a student by visible-token alignment, reconstruction, or both: one role, "student".

    Batches are windows as the data give them, uint8 [B, L]. The mask of a window follows from the seed, the
    step and the window's content.

    Args:
        encoder: the student.
        decoder: of the encoder's width; None for the method "distill_only".
        teacher: None for the method "reconstruct_only".
        config: method, shares, weights.
        kmers: tokenizer whose groups are masked; the teacher's, or NTv2's 6-mers without one.
        seed: of the masks (≥ 0).

    Raises:
        ValueError: the method lacks a part that it needs, or has one that it would leave untrained.

    Example:
        >>> from stillhouse.genomic.student import build_student, preset
        >>> encoder = build_student(preset("cnn_32"))
        >>> config = DistillConfig(method="reconstruct_only")
        >>> distiller = HadDistiller(encoder, MaskedDecoder(encoder.width), None, config)
        >>> sorted(distiller.trainable()["student"])
        ['decoder', 'encoder']
    """

    def __init__(
        self,
        encoder: Encoder | RcEquivariant,
        decoder: MaskedDecoder | None,
        teacher: Teacher | None,
        config: DistillConfig,
        *,
        kmers: KmerTokenizer | None = None,
        seed: int = 0,
    ) -> None:
        if not (config.aligns or config.reconstructs):
            raise ValueError(f"method {config.method!r} is not one of this distiller")
        if config.aligns != (teacher is not None):
            raise ValueError(
                f"method {config.method!r} {'needs a teacher' if config.aligns else 'takes no teacher'}"
            )
        if config.reconstructs != (decoder is not None):
            raise ValueError(
                f"method {config.method!r} {'needs a decoder' if config.reconstructs else 'takes no decoder'}"
            )
        self.encoder, self.decoder, self.teacher = encoder, decoder, teacher
        self.config, self.seed = config, seed
        self.characters = CharacterTokenizer()
        self.kmers = teacher.tokenizer if teacher is not None else kmers or KmerTokenizer()
        parts: dict[str, nn.Module] = {"encoder": encoder}
        if decoder is not None:
            parts["decoder"] = decoder
        self.projectors = nn.ModuleList()
        if teacher is not None:
            self.projectors.extend(
                Projector(config.projector, encoder.width, teacher.width) for _ in config.layers
            )
            parts["projectors"] = self.projectors
        self.parts = nn.ModuleDict(parts)

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student with what it needs in training alone: decoder and projectors."""
        return {"student": self.parts}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {} if self.teacher is None else {"teacher": self.teacher.network}

    def roles(self, step: int) -> Sequence[str]:
        """Always the student."""
        return ("student",)

    def loss(self, role: str, batch: Tensor, step: Step) -> Losses:
        """Draw a mask, and both terms under it."""
        device = next(self.encoder.parameters()).device
        view = view_of(batch, self.characters, self.kmers)
        key = (self.seed << 40) + step.index
        mask = seeded_mask(view.tokens, self.config.mask_ratio, tokenizer=self.kmers, key=key)
        every = self.config.gradient_every
        return self.losses(view.to(device), mask.to(device), norms=bool(every) and step.index % every == 0)

    def losses(self, view: View, mask: GroupMask, *, norms: bool = False) -> Losses:
        """The terms of a batch under a given mask.

        Args:
            view: the batch.
            mask: what is hidden of it.
            norms: measure the norm of each term's gradient at the student's features, too.
        """
        hidden = view.ids.masked_fill(mask.characters, self.characters.mask_id)
        features = self.encoder(hidden, attend=view.attend)
        terms, weights = {}, {}
        if self.teacher is not None:
            terms["align"], weights["align"] = self.alignment(features, view, mask), 1.0
        if self.decoder is not None:
            logits = self.decoder(features, view.attend & ~mask.characters, mask.characters)
            terms["reconstruct"] = window_mean(
                F.cross_entropy(logits[mask.characters], view.nucleotides[mask.characters], reduction="none"),
                mask.characters,
            )
            weights["reconstruct"] = self.config.reconstruct_weight if self.teacher is not None else 1.0
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        shown = dict(terms)
        if norms and features.requires_grad:
            for name, value in terms.items():
                (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
                shown[f"gradient_{name}"] = gradient.norm()
        task = "reconstruct" if "reconstruct" in terms else None
        return Losses(total, shown, weights=weights, task=task)

    def alignment(self, features: Tensor, view: View, mask: GroupMask) -> Tensor:
        """L_align.

        Args:
            features: the student's, [B, L, d].
            view: the batch.
            mask: tokens that count: `alignable`, or `groups` for the method "masked_only".
        """
        assert self.teacher is not None  # losses() asks
        where = mask.groups if self.config.method == "masked_only" else mask.alignable
        visible = mask.visible if self.config.teacher_view == "visible" else None
        targets = self.teacher.features(view.tokens, visible=visible, layers=self.config.layers)
        pooled = view.tokens.pool(features)[where]
        errors = []
        for projector, target in zip(self.projectors, targets, strict=True):
            chosen = target.to(features.device)[where]
            if self.config.target_norm:
                chosen = F.layer_norm(chosen, chosen.shape[-1:])
            square = (projector(pooled).to(chosen.dtype) - chosen).square()
            errors.append(square.mean(-1) if self.config.reduction == "mean" else square.sum(-1))
        return window_mean(torch.stack(errors).mean(0), where)


def window_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the chosen places of each window, then over windows; a window without any counts as 0.

    Args:
        values: of the chosen places, in their order, [n].
        where: bool [B, M] with n entries True.

    Returns:
        Scalar, attached to `values` also where nothing is chosen.

    Example:
        >>> where = torch.tensor([[True, True], [True, False]])
        >>> window_mean(torch.tensor([1.0, 3.0, 5.0]), where).item()
        3.5
    """
    counts = where.sum(1)
    rows = where.nonzero()[:, 0]
    return (values / counts[rows].to(values.dtype)).sum() / max(len(where), 1)
