"""FLUX.1-Fill in diffusers."""
