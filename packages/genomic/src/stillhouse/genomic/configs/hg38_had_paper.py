"""The human genome on GPUs: NTv2-500M as teacher, a 1.1M student, 10,000 steps.

Set data.fasta to hg38.fa and data.bed to the training intervals (`--set`). Of HAD itself: NTv2-500M's last
layer as the target, about 1.1M parameters of two-directional Gated DeltaNet with one attention layer, 10,000
steps, reverse-complement augmentation. Of the lineage it is compared with (Caduceus, 1k recipe): windows of
1,024 bp, 1,024 windows a step, AdamW with lr 8e-3, betas (0.9, 0.95), weight decay 0.1, gradient clip 1,
cosine with 10 % warm-up down to 1e-4, 15 % masked. Our reading, since it was not seen: the number of layers
and the width, λ = 1 on a mean over channels, LayerNorm on targets, what the teacher sees, and the decoder.

NTv2's weights are CC-BY-NC-SA 4.0: the student's card says so. Under `torchrun` and SLURM the launcher says
how many devices there are; data.workers cut windows.
"""

data = dict(
    fasta=("data/hg38.fa",),
    bed="data/human-sequences.bed",
    length=1_024,
    block=1_048_576,
    validation=0.02,
    test=0.05,
    reverse_complement=0.5,
    workers=8,
)
model = dict(kind="gdn", width=128, gdn_layers=2, attention_layers=1)
teacher = dict(source="InstaDeepAI/nucleotide-transformer-v2-500m-multi-species")
distill = dict(
    method="had",
    batch=1_024,
    mask_ratio=0.15,
    reconstruct_weight=1.0,
    reduction="mean",
    target_norm=True,
    layers=(-1,),
    teacher_view="visible",
    gradient_every=100,
)
optim = dict(
    name="adamw",
    lr=8e-3,
    betas=(0.9, 0.95),
    weight_decay=0.1,
    schedule="cosine",
    warmup_steps=1_000,
    min_lr_ratio=0.0125,
)
train = dict(
    steps=10_000,
    accumulate=1,
    precision="bf16-mixed",
    accelerator="cuda",
    devices=1,
    clip_norm=1.0,
    checkpoint_every=500,
    log_every=50,
)
evaluate = dict(tasks=(), baselines=False)
