"""FLUX.2 in diffusers."""
