"""SemanticKITTI on GPUs, first stage: LiDiff's teacher at full width, then its refinement net.

Set data.path to the folder that holds sequences/. From the reference code: 18,000 and 180,000 points within
50 m, maps of 0.1 m, voxels of 0.05 m, widths, noise schedule, Adam 1e-4 halved every five of twenty epochs,
batch 2, guidance 6 at 50 steps, 6 points of one by the refinement net. Steps are epochs of 19,130 sweeps
(sequences 00 to 07, 09, 10) at that batch on one GPU. Fine-tuning by preference follows Diffusion-DPO; its
data, β and steps are not public: ours.
"""

data = dict(
    path="data/semantickitti",
    train=("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    test=("08",),
    points=18_000,
    factor=10,
    max_range=50.0,
    min_range=3.5,
    map_voxel=0.1,
    cache="data/semantickitti_maps",
    workers=8,
)
model = dict(
    channels=(32, 32, 64, 128, 256, 256, 128, 96, 96),
    refine_channels=(32, 32, 64, 128, 256, 256, 128, 96, 96),
    refine_factor=6,
    voxel=0.05,
    point_offsets=False,
    batch_size=2,
)
teacher = dict(
    steps=191_300,
    lr=1e-4,
    timesteps=1000,
    beta_start=3.5e-5,
    beta_end=0.007,
    drop_condition=0.1,
    moment_weight=5.0,
    preference_steps=9_565,
    preference_beta=1.0,
    preference_lr=1e-5,
    refine_steps=47_825,
)
distill = dict(students=())
optim = dict(name="adam", schedule="multistep", milestones=(47_825, 95_650, 143_475), gamma=0.5)
train = dict(accelerator="cuda", checkpoint_every=2_000, log_every=50)
evaluate = dict(
    sampler="vp_reference",
    teacher_steps=(50, 8),
    student_steps=(8,),
    teacher_guidance=6.0,
    student_guidance=3.5,
    steps=8,
    scans=20,
    convention="reference",
)
