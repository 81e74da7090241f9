"""KV memory: a pool of reference-counted blocks, a prefix cache over them, and one block table per sequence."""
