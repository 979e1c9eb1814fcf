"""Knowledge-distillation objectives as pure functions over tensors, one family a file.

Conventions, the same everywhere: the student is the first argument and the teacher the second; the
direction of a divergence is named teacher first (`forward_kl` is KL(teacher ‖ student)); the teacher is
detached inside; logits are [..., V], a mask is bool [...] with True for what counts; values are computed
and returned in float32 (float64 for float64 inputs), under autocast too; `reduction` is "token_mean"
unless said otherwise. Nothing here knows of a trainer.
"""

from __future__ import annotations

from ._reduction import Reduction as Reduction
from ._reduction import reduce as reduce
from .balance import GradNorm as GradNorm
from .balance import LossBalancer as LossBalancer
from .balance import SumNormalised as SumNormalised
from .balance import Uncertainty as Uncertainty
from .contrastive import CRD as CRD
from .contrastive import info_nce as info_nce
from .contrastive import mi_alpha as mi_alpha
from .contrastive import mi_alpha_loss as mi_alpha_loss
from .divergence import alpha_divergence as alpha_divergence
from .divergence import forward_kl as forward_kl
from .divergence import generalized_jsd as generalized_jsd
from .divergence import kd_loss as kd_loss
from .divergence import reverse_kl as reverse_kl
from .divergence import skew_forward_kl as skew_forward_kl
from .divergence import skew_reverse_kl as skew_reverse_kl
from .divergence import tvd as tvd
from .features import MGDGenerator as MGDGenerator
from .features import attention_transfer as attention_transfer
from .features import cka as cka
from .features import cosine as cosine
from .features import hint_loss as hint_loss
from .features import linear_cka as linear_cka
from .features import mgd as mgd
from .features import pkd as pkd
from .fused import LinearHead as LinearHead
from .fused import fused_linear_jsd as fused_linear_jsd
from .fused import fused_linear_kl as fused_linear_kl
from .logits import dist_loss as dist_loss
from .logits import dkd as dkd
from .logits import logit_mse as logit_mse
from .logits import logit_standardization as logit_standardization
from .logits import soft_cross_entropy as soft_cross_entropy
from .logits import taid_target as taid_target
from .relations import attention_relation as attention_relation
from .relations import correlation_congruence as correlation_congruence
from .relations import pairwise_distances as pairwise_distances
from .relations import rkd_angle as rkd_angle
from .relations import rkd_distance as rkd_distance
from .relations import similarity_kl as similarity_kl
from .relations import similarity_preserving as similarity_preserving
from .sequence import causal_shift as causal_shift
from .sequence import on_policy_kl as on_policy_kl
from .subclass import PseudoSubclasses as PseudoSubclasses
from .subclass import class_logits as class_logits
from .subclass import lelp_loss as lelp_loss
from .term import DistillationLoss as DistillationLoss
from .term import RatioWatch as RatioWatch
from .term import Term as Term
from .term import WeightedSum as WeightedSum
from .topk import SparseTeacher as SparseTeacher
from .topk import topk_kl as topk_kl
from .transport import sinkhorn_loss as sinkhorn_loss
from .transport import sinkhorn_plan as sinkhorn_plan
from .vocabulary import VocabAlignment as VocabAlignment
from .vocabulary import uld_loss as uld_loss
