"""Simulated stones on a CPU: teacher, student, two baselines and a report in about two minutes."""

data = dict(
    stones_per_class=14,
    patches_per_fragment=3,
    test=0.3,
    validation=0.2,
    new_classes=("CYS",),
    image_size=48,
    augment="stones",
)
model = dict(
    backbone="resnet10", width=8, dim=32, teacher_backbone="resnet10", teacher_width=16, teacher_dim=32
)
teacher = dict(
    steps=120, lr=3e-3, shots=4, queries=4, pool=0, branches=("class", "class"), diversity=0.1, refine=0.0
)
distill = dict(method="hypothesis", per_class=8, pool=0, weight=1.0)
optim = dict(name="adamw", lr=3e-3, weight_decay=1e-4, warmup_steps=10)
train = dict(steps=120, log_every=20, threads=2)
