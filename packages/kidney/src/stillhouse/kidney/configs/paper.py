"""Endoscopic patches on GPUs: ResNet-50 from ImageNet weights, 256-pixel patches, 16 a class and GPU.

Set data.path to a folder `<root>/<view>/<split>/<class>/` or a manifest, and model.weights to a local file
with ImageNet weights (the student starts from them, and so does the teacher: our reading). Student backbone,
patch size and augmentation are the papers'; the rest is our reading, since the recipe of the paper is not
public: the teacher's size too, and batch, learning rate and weight decay.
"""

data = dict(
    path="data/stones",
    split="stone",
    test=0.2,
    validation=0.1,
    image_size=256,
    augment="stones",
)
model = dict(
    backbone="resnet50",
    width=64,
    dim=128,
    stem="imagenet",
    weights="weights/resnet50_imagenet.safetensors",
    teacher_from_weights=True,
    teacher_backbone="resnet50",
    teacher_width=64,
    teacher_dim=512,
    teacher_trunk="separate",
)
teacher = dict(
    steps=20000, lr=1e-4, branches=("class", "class"), shots=10, queries=15, pool=0, refine=0.0, diversity=0.1
)
distill = dict(method="hypothesis", metric_loss="multi_similarity", per_class=16, pool=0, weight=1.0)
optim = dict(name="adam", lr=1e-4, weight_decay=4e-4, schedule="cosine", warmup_steps=500)
train = dict(
    steps=20000,
    precision="bf16-mixed",
    strategy="auto",
    accelerator="cuda",
    devices=1,  # under torchrun and SLURM the launcher says how many
    clip_norm=1.0,
    ema=0.999,
    checkpoint_every=1000,
    log_every=50,
)
evaluate = dict(workers=8)
