"""Sweep files, the trials that they mean, and the tables of their results. `distributed` runs the trials."""
