"""Terms of a teacher's weights, read from its model card and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stillhouse.core.provenance import Licence

NTV2_LICENCE = "CC-BY-NC-SA-4.0"

_SPDX = {
    name.lower(): name
    for name in (
        *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "GPL-2.0", "GPL-3.0", "AGPL-3.0", "LGPL-3.0"),
        *("CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-ND-4.0"),
        *("CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "Unlicense"),
    )
}
_UNKNOWN = {"", "other", "unknown", "none", "null"}


def find_licence(card: str | None, config: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The licence that a model states.

    Args:
        card: text of its README.md, or None.
        config: its config.json.
        names: what it is called: the source it was loaded from and names in its configuration.

    Returns:
        SPDX identifier (or the stated name); `NTV2_LICENCE` for the Nucleotide Transformer's weights even
        where no card came along; None when nothing is stated.
    """
    front = re.match(r"---\r?\n(.*?)\r?\n---", card or "", re.DOTALL)
    stated = [
        re.search(r"^license:[ \t]*['\"]?([^'\"#\r\n]*)", front[1], re.MULTILINE) if front else None,
        re.search(r"^license_name:[ \t]*['\"]?([^'\"#\r\n]*)", front[1], re.MULTILINE) if front else None,
    ]
    found = [match[1].strip() for match in stated if match]
    found += [str(config[key]) for key in ("license", "licence") if isinstance(config.get(key), str)]
    for name in found:
        if name.lower() not in _UNKNOWN:
            return _SPDX.get(name.lower(), name)
    return NTV2_LICENCE if is_nucleotide_transformer(config, names) else None


def is_nucleotide_transformer(config: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a model is InstaDeep's: by its name, or by the marks of NTv2's own configuration."""
    if any("nucleotide-transformer" in name.lower() or "instadeep" in name.lower() for name in names):
        return True
    own_code = "EsmConfig" in str(config.get("auto_map", {}).get("AutoConfig", ""))
    return own_code and "add_bias_fnn" in config and config.get("vocab_size") == 4107


def licence_terms(licence: str | None, name: str) -> Licence:
    """The entry for a student's card.

    Args:
        licence: as a teacher states it; None is said to be unknown.
        name: of the teacher.

    Example:
        >>> licence_terms("CC-BY-NC-SA-4.0", "nucleotide-transformer-v2-500m").commercial
        False
    """
    if licence is None:
        return Licence(
            what="teacher weights",
            name=name,
            licence="unknown",
            terms="The teacher states no licence; find out before the student is passed on.",
        )
    if "-NC" in licence.upper():
        return Licence(
            what="teacher weights",
            name=name,
            licence=licence,
            terms="Non-commercial use only, and a student distilled from these weights may inherit that"
            + ("; adaptations are shared under the same licence." if "-SA" in licence.upper() else "."),
            url="https://creativecommons.org/licenses/by-nc-sa/4.0/" if licence == NTV2_LICENCE else "",
            commercial=False,
        )
    return Licence(what="teacher weights", name=name, licence=licence)
