"""Conditioning of an image: prompts, LoRA, ControlNet."""
