"""A run on disk: its directory, its records, its manifest, and the run writer. No torch, no Ray."""
