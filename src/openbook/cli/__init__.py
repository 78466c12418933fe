"""The command line: one file per command, each exporting a click command named `command`."""
