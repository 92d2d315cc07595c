"""Everything that imports Ray: connecting, data, collection, training workers and evaluation actors."""

import os

# Ray reads it when it is imported. Runs survive lost processes, so Ray's long messages about them are not printed.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while|has been marked dead|Raylet is terminated"
)
