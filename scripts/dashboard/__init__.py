"""The web page that shows a run: event logs in, one page out. It reads and never acts."""
