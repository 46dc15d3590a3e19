"""A run on disk: its directory, records, manifest, and the one that writes them. No torch, no Ray."""
