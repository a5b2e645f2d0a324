"""Stages, commands, tracking: the driver's side of a run."""

import os

# Read when torch is loaded. Its threads would otherwise wait for each other by spinning, which on a busy machine makes an update 30 times
# slower: two threads need both cores at the same instant.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
