"""Write the built-in dataset `synthetic`: 2,400 short H.264 videos, about a minute on two cores.

    python scripts/make_synthetic.py data/synthetic
    python scripts/make_synthetic.py data/synthetic_even --dwell even --train 500 --test 100

A folder that already has the same dataset is not changed; a killed run continues where it stopped.
"""

import argparse
import sys

from atfr.data.datasets.synthetic import DWELLS, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="number of training videos (default: %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="number of test videos (default: %(default)s)")
    parser.add_argument("--size", type=int, default=56, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=36, help="frames per video (default: %(default)s)")
    parser.add_argument("--dwell", choices=DWELLS, default="uneven", help="how long each phase lasts (default: %(default)s)")
    parser.add_argument("--distractors", action="store_true", help="add change that means nothing: other scenery, passing objects, flicker, switched light, camera shake")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per CPU core)")
    try:
        generate(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"make_synthetic: {error}")


if __name__ == "__main__":
    main()
