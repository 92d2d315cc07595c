"""Whole jobs, from checked settings to the result: a training, a sweep or a dataset, in this process or on Ray."""
