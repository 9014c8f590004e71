"""What steers an image: prompts, LoRA, ControlNet; and latent previews."""
