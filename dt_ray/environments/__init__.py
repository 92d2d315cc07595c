"""Environments that are stepped together, and behaviours that act in them without learning."""
