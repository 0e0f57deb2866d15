"""The primitives of a layer: each file holds an operation's contract, its plain-JAX form and the choice of implementation."""
