"""Which trials come of a sweep, and the tables made of them. Ray Tune runs them, in `distributed`."""
