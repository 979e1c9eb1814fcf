"""The demo for mmengine's Runner: `python -m stillhouse.kidney.mmengine_runner --config mmengine_demo`."""

_base_ = "demo.py"

train = dict(checkpoint_every=40)
