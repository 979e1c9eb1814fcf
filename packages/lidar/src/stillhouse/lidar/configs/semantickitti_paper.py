"""SemanticKITTI on GPUs, second stage: Distillation-DPO from a finished teacher, with VSD beside it.

Set data.path to the folder that holds sequences/ and teacher.weights to the run of
`semantickitti_paper_teacher`. From the reference code: SGD without momentum at 1e-5 for student and auxiliary
nets, clipping at 0.05, batch 1 a GPU, one update of each in turn, the student made in one step and sampled in
eight with guidance 3.5, the loser from the same noise times 1.1 and as heavy as the winner. That last weight
of 1 has no lower bound in closed form (the run warns): `--set distill.loser_weight=0.25`, or
`--set distill.anchor=1 --set distill.pair_weight=sigmoid`, is bounded. Steps are ten epochs on two GPUs.
"""

_base_ = "semantickitti_paper_teacher.py"

model = dict(batch_size=1)
teacher = dict(weights="runs/semantickitti_teacher")
distill = dict(
    students=("distillation_dpo", "vsd"),
    steps=95_650,
    lr=1e-5,
    critic_lr=1e-5,
    critic_ratio=1,
    student_steps=1,
    loser_weight=1.0,
    pair_noise="scaled_1.1",
)
optim = dict(name="sgd", momentum=0.0, schedule="constant", milestones=(), gamma=0.1)
train = dict(clip_norm=0.05)
