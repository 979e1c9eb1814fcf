"""Typed configuration: files and mappings are converted strictly into frozen dataclasses.

A configuration class is a keyword-only, slotted, frozen dataclass whose fields are plain values or, one
level below, dataclasses of plain values. `load_config` fills it from an mmengine-style Python file (with
`_base_` inheritance), JSON, YAML or a mapping. An unknown key, a wrong type or an impossible value is a
`ConfigError` that names the file and the field.

Configuration files in Python are executed: read only files you trust.
"""

from __future__ import annotations

from ._checks import check_at_least as check_at_least
from ._checks import check_choice as check_choice
from ._checks import check_finite as check_finite
from ._checks import check_share as check_share
from ._convert import check_class as check_class
from ._convert import describe as describe
from ._load import load_config as load_config
from ._load import save_config as save_config
from ._load import to_dict as to_dict
from ._source import describe_preset as describe_preset
from ._source import list_presets as list_presets
from ._source import read_source as read_source
from ._source import resolve as resolve
