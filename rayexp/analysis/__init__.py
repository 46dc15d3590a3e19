"""Reads what runs left behind and says what it means. Records, runs and data are all it knows; no torch, no Ray."""
