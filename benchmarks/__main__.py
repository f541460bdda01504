"""``python -m benchmarks [casting] [clipping] [training_step]``: all of them by default."""

import sys

from benchmarks import casting, clipping, training_step

_ALL = {"casting": casting.main, "clipping": clipping.main, "training_step": training_step.main}


def main() -> None:
    wanted = sys.argv[1:] or list(_ALL)
    unknown = [name for name in wanted if name not in _ALL]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; expected some of {', '.join(_ALL)}")
    for name in wanted:
        _ALL[name]()


main()
