"""The error that the command line prints without a traceback."""


class DemoError(Exception):
    """The demo cannot do what it was asked; the message says what is wrong and what to do.

    Example:
        >>> raise DemoError("text is empty; give --text a file with at least one byte")
        Traceback (most recent call last):
        ...
        moe_jax.demo.errors.DemoError: text is empty; give --text a file with at least one byte
    """
