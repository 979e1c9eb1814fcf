"""KTH-TIPS grey textures with five labelled images a class, cut by image group; minutes on two CPU cores.

Set data.path to the folder with the ten class folders. The training images without labels (40 a class) are
seen by the teacher and, through it, by the guided student; `--set data.pool=false` takes them away.
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
    backbone="resnet10", width=16, dim=64, teacher_backbone="resnet10", teacher_width=32, teacher_dim=64
)
teacher = dict(steps=400, lr=3e-3, branches=("class", "image"), shots=5, queries=5, pool=48)
distill = dict(method="hypothesis", per_class=5, pool=48)
optim = dict(name="adamw", lr=3e-3, weight_decay=1e-4, warmup_steps=20)
train = dict(steps=400, log_every=20, checkpoint_every=100)
