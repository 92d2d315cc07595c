"""Reads logs into checked episodes: finds files, names columns, groups rows into episodes.

The formats of files are in `dt_ray.data.formats`; the work on episodes afterwards is in `dt_ray.data` itself.
"""
