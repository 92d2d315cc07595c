"""What several test files share: running commands, and finding the processes that the tests started."""
