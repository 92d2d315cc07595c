"""A training, a sweep or a dataset from the command to the end, in this process or on Ray."""
