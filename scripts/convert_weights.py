"""A published checkpoint to a folder that minidit loads, and back: the same as `minidit convert`.

    python scripts/convert_weights.py hpcai-tech/OpenSora-STDiT-v3 opensora-1.2 --dtype bfloat16 --verify
"""

import sys
from collections.abc import Sequence

from minidit import cli


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
