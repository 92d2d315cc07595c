"""Facts about a log, which `describe` and `validate` report: columns, clocks, outliers and traps.

Nothing here changes what is trained on.
"""
