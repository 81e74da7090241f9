"""Local mode: the processes of a Plan on one machine, and nothing more."""
