"""Word-level language modelling."""
