"""What is done to the user's optimizers: hooks around their updates, who owns them, how several make one."""
