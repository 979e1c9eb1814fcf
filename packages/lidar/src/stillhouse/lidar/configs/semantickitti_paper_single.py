"""SemanticKITTI on GPUs: the light single-pass network, with the teacher's help and without.

Set data.path and teacher.weights as for `semantickitti_paper`. The idea is LiNeXt's (arXiv 2511.10209, of
which the abstract was read); widths, steps and learning rate are ours.
"""

_base_ = "semantickitti_paper_teacher.py"

model = dict(single_channels=(16, 16, 32, 48, 64, 64, 48, 32, 32), batch_size=2)
teacher = dict(weights="runs/semantickitti_teacher")
distill = dict(
    students=("single_pass", "single_pass_alone"), single_steps=95_650, single_lr=1e-3, single_weight=0.5
)
optim = dict(name="adamw", schedule="cosine", milestones=(), gamma=0.1, warmup_steps=1_000)
train = dict(clip_norm=1.0)
