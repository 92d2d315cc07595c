"""Everything that imports Ray: connecting, data, collection, training workers and evaluation actors."""
