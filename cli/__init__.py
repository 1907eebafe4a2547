"""The `ttt-e2e` command: thin, one file per sub-command."""
