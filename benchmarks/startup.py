"""What it costs to ask: CPU-seconds of `--help`, `tessellar list` and imports, beside `import torch`.

    python benchmarks/startup.py [--rounds 5]

Each command is a process of its own; user and system time of its processes are added, and the least of the rounds
counts. Help and lists are made from the sources and import nothing heavy (`tests/cli/test_catalogue.py` looks at
`sys.modules`).
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESSELLAR = "from tessellar.cli.main import main; main()"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import tessellar": ["-c", "import tessellar"],
    "tessellar list tokenizers": ["-c", TESSELLAR, "list", "tokenizers"],
    "train.py --help": ["train.py", "--help"],
    "sample.py --help": ["sample.py", "--help"],
    "evaluate.py --help": ["evaluate.py", "--help"],
    "evaluate.py model --help": ["evaluate.py", "model", "--help"],
    "convert.py --help": ["convert.py", "--help"],
}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one run of `python WORDS`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print a line each command."""
    parser = argparse.ArgumentParser(description="CPU-seconds of help, lists and imports")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, words in COMMANDS.items():
        least = min(cpu_seconds(words) for _ in range(rounds))
        print(f"{name:<26} {least:6.2f} CPU-s", flush=True)


if __name__ == "__main__":
    main()
