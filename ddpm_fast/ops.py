"""The engine's ops by name: the only place that chooses how they are computed."""

from ddpm_fast.reference import (
    Dropout,
    group_norm_silu,
    noise_mse,
    q_sample,
    reverse_step,
    timestep_embedding,
)

__all__ = ["Dropout", "group_norm_silu", "noise_mse", "q_sample", "reverse_step", "timestep_embedding"]
