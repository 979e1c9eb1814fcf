"""KTH-TIPS grey textures, five labelled images a class, cut by image group.

Set data.path to the folder with the ten class folders. The guided student sees the 40 training images a class
that have no label, through the teacher; `--set data.pool=false` takes them away. About ten minutes on a core.
"""

data = dict(
    path="data/kth_tips_gray",
    layout="kth_tips",
    split="stone",
    test=0.45,
    shots=5,
    pool=True,
    image_size=64,
    zoom=2.0,
    crops=4,
    augment="window",
    window=(0.25, 0.85),
)
model = dict(
    backbone="resnet10", width=16, dim=64, teacher_width=24, teacher_dim=64, teacher_trunk="separate"
)
teacher = dict(
    steps=400,
    lr=3e-3,
    branches=("class", "class", "class"),
    shots=3,
    queries=2,
    pool=0,
    episode_weight=0.2,
    classify_weight=1.0,
    refine=0.0,
)
distill = dict(
    method="hypothesis", metric_loss="contrastive", weight=3.0, temperature=2.0, per_class=3, pool=32
)
optim = dict(name="adamw", lr=3e-3, weight_decay=1e-4, warmup_steps=20)
train = dict(steps=800, log_every=20, checkpoint_every=200)
