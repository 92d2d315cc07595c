"""Logs into checked episodes: which files, what their columns mean, which rows are one episode, and reading them.

The formats of files are in `dt_ray.data.formats`; what is done with episodes afterwards is in `dt_ray.data` itself.
"""
