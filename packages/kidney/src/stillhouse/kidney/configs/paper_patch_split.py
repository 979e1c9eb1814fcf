"""The papers' protocol: the same as `paper`, cut at patch level, so that a stone may be in train and test."""

_base_ = "paper.py"

data = dict(split="patch")
