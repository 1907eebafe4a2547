"""The `ttt-e2e` command: thin, one file per sub-command.

The console script knows this folder as `ttt_e2e_cli`, beside the package, so that help needs no torch. What is outside
the folder is imported by its full name (`ttt_e2e.serving`), and only where it is used.
"""
