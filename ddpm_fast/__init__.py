"""Train and sample denoising diffusion models (DDPM)."""

__version__ = "0.1.0"
