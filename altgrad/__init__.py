"""What people run: the command line, the study and its report. Nothing imports this package."""
