"""Stable Diffusion XL in diffusers."""
