"""Simulated streets, sized for two CPU cores: what the tables of the README are made with.

The few-step students have the Chamfer distance to the ground truth beside the score term (`data_weight`, our
addition); without it they are plain VSD and Distillation-DPO.
"""

data = dict(streets=16, test_streets=4, scans=4, rings=32, azimuths=512, points=400, max_range=20.0)
model = dict(
    channels=(16, 16, 24, 32, 32, 24, 16),
    single_channels=(16, 16, 24, 32, 32, 24, 16),
    voxel=0.25,
    batch_size=2,
)
teacher = dict(steps=900, lr=2e-3)
distill = dict(
    students=("distillation_dpo", "vsd", "single_pass", "single_pass_alone"),
    steps=150,
    lr=2e-4,
    critic_lr=4e-4,
    loser_weight=0.25,
    data_weight=1.0,
    single_steps=300,
    single_lr=2e-3,
)
optim = dict(name="adam", schedule="cosine")
train = dict(clip_norm=1.0, log_every=25, threads=1)
evaluate = dict(teacher_guidance=1.0, steps=2, scans=2)
