"""Diffusion and flow distillation: schedules, predictions, guidance, solvers, samplers, surrogates."""
