"""AutoRefiner: autoregressive video diffusion, sampled chunk by chunk."""

__version__ = "0.1.0"
