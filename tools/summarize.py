"""Say what runs have reached: `python -m tools.summarize output/RUN ...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from utils import escaped, read_log


def summary(folder: Path) -> str:
    """Accuracies from a run's log.txt and where its files are.

    Raises:
        OSError: if the folder has no log.txt, or it cannot be read.
    """
    records = read_log(folder)
    tested = [record for record in records if isinstance(record.get("test_acc1"), float | int)]
    lines = [f"{folder}: {len(records)} epochs"]
    if tested:
        best = max(tested, key=lambda record: record["test_acc1"])
        last = tested[-1]["test_acc1"]
        lines.append(f"  top-1 {last:.2f} % at the end, {best['test_acc1']:.2f} % at best (epoch {best['epoch']})")
        if isinstance(tested[-1].get("test_ema_acc1"), float | int):
            lines.append(f"  top-1 {tested[-1]['test_ema_acc1']:.2f} % of the averaged weights at the end")
    lines.append(f"  log {folder / 'log.txt'}, TensorBoard {folder / 'tensorboard'}")
    lines.append(f"  checkpoints {folder / 'checkpoint.pth'} and {folder / 'best.pth'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of runs")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    for folder in parser.parse_args().folders:
        try:
            print(summary(folder))
        except OSError as error:
            _end(f"{folder / 'log.txt'}: {error.strerror}; name a run's --output-dir")


def _end(message: str) -> NoReturn:
    print(f"summarize: error: {escaped(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
