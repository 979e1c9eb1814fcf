"""Simulated stones on a CPU: teacher, student, two baselines and a report in about a minute and a half."""

data = dict(
    stones_per_class=14,
    patches_per_fragment=3,
    test=0.3,
    validation=0.2,
    new_classes=("BRU", "CYS"),
    image_size=48,
    augment="stones",
)
model = dict(backbone="resnet10", width=8, dim=32, teacher_width=16, teacher_dim=32)
teacher = dict(
    steps=300,
    lr=3e-3,
    branches=("class", "class"),
    shots=4,
    queries=4,
    pool=0,
    episode_weight=0.2,
    classify_weight=1.0,
    diversity=0.1,
    refine=0.0,
)
distill = dict(method="hypothesis", metric_loss="contrastive", per_class=8, pool=0, weight=3.0)
optim = dict(name="adamw", lr=3e-3, weight_decay=1e-4, warmup_steps=10)
train = dict(steps=300, log_every=20, threads=2)
