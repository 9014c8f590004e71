"""`python -m stable_diffusion_server`."""

from stable_diffusion_server.cli import main

main()
