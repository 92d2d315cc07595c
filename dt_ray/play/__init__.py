"""Policies that act: rollout, evaluation, collection and sessions of live episodes. Nothing here trains."""
