"""Why the page cannot be shown."""

from subnet.commandline import UsageError


class DashboardError(Exception):
    """One line with the value and the remedy."""


class OptionError(DashboardError, UsageError):
    """An option's value that says nothing."""
