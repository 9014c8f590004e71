"""Where diffusion happens, and the only place torch is imported. Families are strangers to one another."""
