"""Public helpers for tests: tiny networks and distillers, processes that are killed."""

from __future__ import annotations

from .models import TinyConvNet as TinyConvNet
from .models import TinyMLP as TinyMLP
from .models import ToyDistiller as ToyDistiller
from .models import TwoRoleDistiller as TwoRoleDistiller
from .models import toy_data as toy_data
from .models import toy_teacher as toy_teacher
from .processes import run_ranks as run_ranks
from .processes import run_script as run_script
