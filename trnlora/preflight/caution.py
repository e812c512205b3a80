"""What a check of `make doctor` returns when it found something to know about that is no failure."""


class Caution(str):
    """The line of such a check; it is marked, and the other checks' lines are not."""
