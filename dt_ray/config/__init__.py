"""The settings of a run: one frozen tree, its YAML files and the packaged experiments; needs no other package here."""
