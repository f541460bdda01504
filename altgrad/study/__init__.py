"""The study: every format through three scenes, paired seeds, and a report of what happened."""
