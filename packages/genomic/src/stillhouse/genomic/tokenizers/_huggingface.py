"""Tokenizers of transformers that give the ids of ours. Imports transformers."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ._letters import AMBIGUOUS


def fast_tokenizer(
    vocabulary: Mapping[str, int],
    *,
    pattern: str,
    special: Mapping[str, str],
    template: str | None,
    padding_side: str = "right",
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Build one.

    Args:
        vocabulary: token → id.
        pattern: regular expression of a token; must cover every text from left to right.
        special: role such as "pad_token" → token.
        template: how a single sequence is wrapped, for example "<cls> $A"; None adds nothing.
        padding_side: "left" or "right".
        max_length: longest sequence in tokens.
    """
    inner = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=special["unk_token"]))
    rules = [
        ("[tuU]", "T"),
        (f"[{AMBIGUOUS[1:]}{AMBIGUOUS.lower()}]", "N"),
        ("a", "A"),
        ("c", "C"),
        ("g", "G"),
    ]
    inner.normalizer = normalizers.Sequence([normalizers.Replace(Regex(old), new) for old, new in rules])
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    inner.decoder = decoders.Fuse()
    if template is not None:
        used = [token for token in special.values() if token in template]
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocabulary[token]) for token in used]
        )
    options = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        **special,
        **options,
    )
