"""What two checkpoints judge differently. Reads what runs left behind; no torch, no Ray."""
