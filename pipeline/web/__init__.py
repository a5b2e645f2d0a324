"""Local pages of this machine: the guard before them, and the server that ends in order. Used by ``steer`` and
``watch``."""
