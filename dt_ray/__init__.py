"""Return-conditioned policies from logged trajectories, on Ray."""
