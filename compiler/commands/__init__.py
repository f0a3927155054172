"""What the command line does beyond one call of the API; the commands themselves are declared in `cli`."""
