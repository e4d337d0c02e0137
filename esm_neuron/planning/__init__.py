"""Before anything is rented: what a run needs in memory, graphs, hours and dollars, and what this machine has."""
