"""Architectures that read a long input through a smaller set of latents."""
