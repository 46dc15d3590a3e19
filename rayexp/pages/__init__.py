"""Offline HTML pages: templates and plots. No torch, no Ray."""
