"""``python -m pipeline`` is ``latent-control``."""

from pipeline.cli.app import main

main()
