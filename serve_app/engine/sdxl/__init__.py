"""Stable Diffusion XL. Imports torch on use only."""
