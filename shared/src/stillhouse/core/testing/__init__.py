"""Public helpers for tests: gradient audits, exact mixtures, tiny networks, processes that are killed."""

from __future__ import annotations

from .gradients import assert_gradcheck as assert_gradcheck
from .gradients import assert_gradient as assert_gradient
from .gradients import assert_gradient_only as assert_gradient_only
from .gradients import assert_no_gradient as assert_no_gradient
from .mixtures import GaussianMixture as GaussianMixture
from .mixtures import Oracle as Oracle
from .models import TinyConvNet as TinyConvNet
from .models import TinyMLP as TinyMLP
from .models import ToyDistiller as ToyDistiller
from .models import TwoRoleDistiller as TwoRoleDistiller
from .models import toy_data as toy_data
from .models import toy_teacher as toy_teacher
from .processes import run_ranks as run_ranks
from .processes import run_script as run_script
