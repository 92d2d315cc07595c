"""Policies for other programs, and policies of other programs."""
