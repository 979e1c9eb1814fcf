"""Configuration and models in the conventions of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from ..student import MaskedDecoder, RcEquivariant, StudentConfig, build_student
from ..student.rc import LETTERS
from ..student.store import MODEL_TYPE

_DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers")


class StudentHFConfig(PretrainedConfig):
    """Settings of a student as transformers keeps them.

    Args:
        student: fields of `StudentConfig`; missing ones have their defaults.
        decoder: arguments of `MaskedDecoder`; None: the folder holds no masked language model.
        mask_token_id: id of [MASK].
        pad_token_id: id of [PAD].
        kwargs: settings that every configuration of transformers has.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        student: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        mask_token_id: int = 3,
        pad_token_id: int = 4,
        **kwargs: Any,
    ) -> None:
        built = StudentConfig(**dict(student or {}))
        for name in _DERIVED:
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.student = asdict(built)
        self.decoder = None if decoder is None else dict(decoder)
        self.vocab_size = built.vocab
        self.hidden_size = built.width * (2 if built.rc_equivariant else 1)
        self.num_hidden_layers = built.depth


class StudentPreTrained(PreTrainedModel):
    """What the two models share."""

    config_class = StudentHFConfig
    base_model_prefix = "student"
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the networks as their constructors made them."""


class StudentModel(StudentPreTrained):
    """The encoder: ids int64 [B, L] → features [B, L, d].

    Example:
        >>> model = StudentModel(StudentHFConfig(student={"width": 16, "attention_heads": 2}))
        >>> model(torch.tensor([[7, 8, 9, 10]])).last_hidden_state.shape
        torch.Size([1, 4, 16])
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012, transformers' own convention

    def __init__(self, config: StudentHFConfig) -> None:
        super().__init__(config)
        self.encoder = build_student(StudentConfig(**config.student))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of letters."""
        return (self.encoder.encoder if isinstance(self.encoder, RcEquivariant) else self.encoder).embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 at padding, on either side; None: no padding.
            output_hidden_states: return the output of every block; the last is `last_hidden_state`.
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` [B, L, d], and `hidden_states` where asked for.
        """
        attend = None if attention_mask is None else attention_mask.bool()
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        layers = None
        if hidden:
            features, outputs = self.encoder(input_ids, attend=attend, hidden=True)
            layers = tuple(outputs)
        else:
            features = self.encoder(input_ids, attend=attend)
        output = BaseModelOutput(last_hidden_state=features, hidden_states=layers)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class StudentForMaskedLM(StudentPreTrained):
    """Encoder and decoder: letters at [MASK].

    Only visible letters are read to decode a masked one, and a visible letter is known: its logits are 0 for
    itself and the lowest number for all else.

    Example:
        >>> model = StudentForMaskedLM(StudentHFConfig(student={"width": 16}, decoder={"width": 16}))
        >>> logits = model(torch.tensor([[7, 3, 9, 10]])).logits
        >>> logits.shape, logits[0, 0].argmax().item()
        (torch.Size([1, 4, 16]), 7)
    """

    def __init__(self, config: StudentHFConfig) -> None:
        super().__init__(config)
        if config.decoder is None:
            raise ValueError(
                "the configuration has no decoder, so there is no masked language model in it; "
                "load it with AutoModel, or save the student with its decoder"
            )
        self.student = StudentModel(config)
        self.decoder = MaskedDecoder(**config.decoder)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Decode masked letters.

        Args:
            input_ids: int64 [B, L] with `config.mask_token_id` at masked letters.
            attention_mask: [B, L], 0 at padding; None: no padding.
            labels: ids [B, L], −100 where there is nothing to predict. Letters with a label are decoded, and
                not read, whether they are [MASK] in `input_ids` or another letter.
            output_hidden_states: see `StudentModel.forward`.
            return_dict: False returns a tuple.

        Returns:
            `logits` [B, L, vocabulary], finite at A, C, G, T of the decoded letters; `loss`, the mean
            cross-entropy over labels that are A, C, G or T, where labels were given.
        """
        attend = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        encoded = self.student(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        queries = (input_ids == self.config.mask_token_id) & attend
        if labels is not None:
            queries = queries | ((labels != -100) & attend)
        visible = attend & ~queries & (input_ids != self.config.mask_token_id)
        nucleotides = self.decoder(encoded.last_hidden_state, visible, queries)
        lowest = torch.finfo(nucleotides.dtype).min
        letters = torch.tensor(LETTERS, device=input_ids.device)
        known = nucleotides.new_full((*input_ids.shape, self.config.vocab_size), lowest)
        decoded = known.index_copy(-1, letters, nucleotides)
        known = known.scatter(-1, input_ids[..., None].long(), 0.0)
        logits = torch.where(queries[..., None], decoded, known)
        loss = None
        if labels is not None:
            place = torch.full((self.config.vocab_size,), -100, device=labels.device)
            place[letters] = torch.arange(4, device=labels.device)
            target = torch.where(queries & (labels >= 0), place[labels.clamp_min(0)], -100)
            count = (target != -100).sum().clamp_min(1)
            loss = (
                F.cross_entropy(
                    nucleotides.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"
                )
                / count
            )
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


def _as_dict(config: PretrainedConfig, asked: bool | None) -> bool:
    return bool(config.return_dict if asked is None else asked)
