"""Plain torch: the definition of truth for every op, and what runs where no faster kernel does."""
