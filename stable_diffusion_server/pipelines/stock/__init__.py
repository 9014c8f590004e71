"""Stock diffusers pipelines, drawn by their own call one step at a time."""
