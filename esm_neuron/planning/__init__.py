"""Plan a run before it starts: memory, graphs, hours and dollars; and what this machine has."""
