"""Simulated streets on a CPU: teacher, three students and a report in a few minutes."""

data = dict(streets=10, test_streets=2, scans=3, rings=32, azimuths=512, points=450, factor=8, max_range=18.0)
model = dict(
    channels=(16, 16, 24, 32, 32, 24, 16),
    single_channels=(16, 16, 24, 32, 32, 24, 16),
    refine_channels=(16, 16, 24, 24, 16),
    voxel=0.3,
    batch_size=1,
)
teacher = dict(steps=700, lr=2e-3, refine_steps=150)
distill = dict(
    students=("distillation_dpo", "single_pass", "single_pass_alone"),
    steps=80,
    lr=2e-4,
    critic_lr=4e-4,
    loser_weight=0.25,
    data_weight=1.0,
    single_steps=120,
    single_lr=2e-3,
)
optim = dict(name="adam", schedule="cosine")
train = dict(clip_norm=1.0, log_every=20, threads=1)
evaluate = dict(
    teacher_steps=(50, 8, 2), student_steps=(8, 2), teacher_guidance=1.0, steps=2, scans=1, levels=(0.5, 0.2)
)
