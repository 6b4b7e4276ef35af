"""What the engine says when it cannot go on: what was expected, what came, how to mend it."""


class SpecError(ValueError):
    """A program or an input that means nothing: wrong shape, wrong range, wrong name."""


class Unsupported(RuntimeError):  # noqa: N818  (a refusal is not a failure)
    """An executor was asked by name for a program it cannot run; the message holds the reason."""
