"""``python -m pipeline`` is ``latent-control``."""

from pipeline.cli.main import main

main()
