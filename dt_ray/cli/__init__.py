"""What the commands share, and the data command. The work that commands start is in `jobs` and below."""
