"""The Wan2.1 network: definition, causal forward, VAE, text, checkpoint files."""
