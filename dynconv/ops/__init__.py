"""The ops: one file each, with its schema, fake, autograd and the choice of a backend."""
