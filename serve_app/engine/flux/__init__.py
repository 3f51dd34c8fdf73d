"""FLUX.1 in diffusers."""
