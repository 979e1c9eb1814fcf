"""One per cent of worm and thale cress, and a bacterium: 4.66 Mb, on two CPU cores.

Set data.fasta and data.annotation to the two genomes with their GFF3 and the bacterium without one:
`--set 'data.fasta=["celegans_1pct.fa","athaliana_1pct.fa","corynebacterium.fna.gz"]'
--set 'data.annotation=["celegans_1pct.gff3","athaliana_1pct.gff3","-"]'`. Blocks of 20 kb are held out; a
student of 80 thousand parameters against a teacher of 4.2 million.
"""

data = dict(
    fasta=(
        "data/celegans_1pct.fa",
        "data/athaliana_1pct.fa",
        "data/corynebacterium_NCTC11397.fna.gz",
    ),
    annotation=("data/celegans_1pct.gff3", "data/athaliana_1pct.gff3", "-"),
    names=("worm", "cress", "bacterium"),
    length=512,
    block=20_000,
    validation=0.1,
    test=0.25,
)
model = dict(kind="gdn", width=56, gdn_layers=1, attention_layers=1, mlp_ratio=1.5)
teacher = dict(width=256, depth=4, heads=8, steps=3_000, batch=8, lr=1e-3, weight_decay=0.05)
distill = dict(method="had", batch=8, mask_ratio=0.15, gradient_every=20)
optim = dict(name="adamw", lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=60, min_lr_ratio=0.03)
train = dict(steps=600, clip_norm=1.0, log_every=20, checkpoint_every=100, threads=1)
evaluate = dict(length=192, site_length=96, limit=500)
