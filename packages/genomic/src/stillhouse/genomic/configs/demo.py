"""Two simulated genomes on a CPU: teacher, HAD student, the student without its teacher, probes, a report."""

data = dict(simulate_kilobases=400, length=240, block=4_000, test=0.3, validation=0.0)
model = dict(kind="gdn", width=32, gdn_layers=1, attention_layers=1, mlp_ratio=2.0)
teacher = dict(width=96, depth=3, heads=4, steps=250, batch=16, lr=2e-3)
distill = dict(method="had", batch=8, mask_ratio=0.15, layers=(-1,), gradient_every=10)
optim = dict(name="adamw", lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=15, min_lr_ratio=0.05)
train = dict(steps=150, clip_norm=1.0, log_every=10, threads=2)
evaluate = dict(
    tasks=("donor", "acceptor", "regions", "species"), length=120, site_length=80, limit=130, resamples=500
)
