"""What a policy will reach, estimated from a log alone: rollouts in a world model of it, and how far to trust them."""
