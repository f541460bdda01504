"""``python -m altgrad`` is ``altgrad``."""

from altgrad.cli import main

if __name__ == "__main__":
    main()
