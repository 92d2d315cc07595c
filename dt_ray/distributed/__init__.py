"""Everything that imports Ray: connecting, data, collection, training workers and evaluation actors."""

import os

# Read when Ray is imported. Lost processes are what a run comes through: pages about them on stdout help nobody.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while|has been marked dead|Raylet is terminated"
)
