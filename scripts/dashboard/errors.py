"""Why the page cannot be shown."""


class DashboardError(Exception):
    """One line with the value and the remedy."""
