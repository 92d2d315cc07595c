"""The facts about a log that `describe` and `validate` report: columns, clocks, outliers, and what looks wrong.

Nothing here changes what is trained on.
"""
