"""``python -m pipeline`` is ``latent-control``."""

from pipeline.cli import main

main()
