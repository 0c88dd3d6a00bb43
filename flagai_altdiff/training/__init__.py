"""Training of the released models' family on Lightning."""
