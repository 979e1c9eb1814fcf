"""Reading a vocabulary from a folder in the conventions of Hugging Face, without importing its libraries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.errors import DataError

FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class VocabularyFile:
    """What a folder says about its tokenizer.

    Attributes:
        path: the file that was read.
        ids: token → id.
        starts_with: the special token put before every sequence, or None.
        named: role such as "pad_token" → token, as far as the folder's tokenizer_config.json names it.
    """

    path: Path
    ids: dict[str, int]
    starts_with: str | None
    named: dict[str, str]


def read_vocabulary(folder: Path) -> VocabularyFile:
    """Read `tokenizer.json`, `vocab.txt` or `vocab.json`, the first that is there.

    Raises:
        DataError: none is there, or it is damaged.
    """
    for name in FILES:
        if (folder / name).is_file():
            break
    else:
        raise DataError(
            f"{folder}: holds none of {', '.join(FILES)}; give the folder of a tokenizer or of a model"
        )
    path = folder / name
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"larger than {_LIMIT >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        roles = {role: _content(token) for role, token in settings.items() if role.endswith("_token")}
        named = {role: token for role, token in roles.items() if token}
        if name == "vocab.txt":
            ids = {line.strip(): index for index, line in enumerate(text.rstrip("\n").split("\n"))}
            usual = next((token for token in ("<cls>", "[CLS]") if token in ids), None)
            starts = named.get("cls_token", usual)  # as EsmTokenizer and BertTokenizer do
        elif name == "vocab.json":
            ids, starts = dict(json.loads(text)), None
        else:
            whole = json.loads(text)
            ids = dict(whole["model"]["vocab"])
            ids.update({str(token["content"]): int(token["id"]) for token in whole.get("added_tokens", [])})
            starts = _first_special(whole.get("post_processor"))
        if not all(isinstance(t, str) and type(i) is int and i >= 0 for t, i in ids.items()):
            raise ValueError("token ids are not integers ≥ 0")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a vocabulary ({error}); copy the folder again") from error
    return VocabularyFile(path, ids, starts, named)


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _first_special(processor: Any) -> str | None:
    """The special token that a post-processor puts first."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        found = (_first_special(part) for part in processor.get("processors", []))
        return next((token for token in found if token), None)
    if "cls" in processor:  # BertProcessing, RobertaProcessing
        return str(processor["cls"][0])
    single = processor.get("single") or [{}]
    return single[0].get("SpecialToken", {}).get("id") if isinstance(single[0], dict) else None
