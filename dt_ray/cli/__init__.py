"""What the commands share, and the data command. What a command does lies in `jobs` and below."""
