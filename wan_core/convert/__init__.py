"""Diffusers weights to megatron's names and layout, and back."""
