"""Runs as one HTML page that needs no network and no server: curves, completions, and what weight each token got."""
