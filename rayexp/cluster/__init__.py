"""A Ray cluster from outside: authentication, submitted jobs, and bringing runs home."""
