"""``python -m benchmarks [casting] [casting_torch] [clipping] [training_step] [peers]``: all of them by default."""

import sys

from benchmarks import casting, casting_torch, clipping, peers, training_step

_ALL = {
    "casting": casting.main,
    "casting_torch": casting_torch.main,
    "clipping": clipping.main,
    "training_step": training_step.main,
    "peers": peers.main,
}


def main() -> None:
    wanted = sys.argv[1:] or list(_ALL)
    unknown = [name for name in wanted if name not in _ALL]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; expected some of {', '.join(_ALL)}")
    for name in wanted:
        _ALL[name]()


main()
