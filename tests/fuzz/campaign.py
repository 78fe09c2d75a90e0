"""A long campaign of the fuzz tests, round after round with another seed: `make fuzz`.

FUZZ_SECONDS: no round begins after these. FUZZ_EXAMPLES: inputs of a test in one round. FUZZ_SEED: of the first round;
each further one has the next. What failed is repeated by the line that is printed with it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def one_round(seed: int, examples: int, tried: Path) -> tuple[int, Counter[str]]:
    """pytest's exit status, and how many inputs each test has tried. What pytest says goes to the terminal."""
    tried.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pytest", str(FOLDER), "--hypothesis-seed", str(seed), "-p", "no:cacheprovider"]
    # As the seed gives them: without the inputs that failed before, and without the suite's fixed ones.
    without = {name: value for name, value in os.environ.items() if name != "CI"}
    environment = {**without, "FUZZ_EXAMPLES": str(examples), "FUZZ_TRIED": str(tried), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, check=False)
    lines = tried.read_text(encoding="utf-8").splitlines() if tried.exists() else []
    return done.returncode, Counter(json.loads(lines[-1]) if lines else {})


def main() -> int:
    seconds = float(os.environ.get("FUZZ_SECONDS", "1200"))
    examples = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
    first = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**31))
    began, seed, total, failed = time.monotonic(), first, Counter[str](), list[int]()
    print(f"first seed {first}, {examples} inputs of a test in a round, rounds for {seconds:g} seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - began < seconds:
            status, tried = one_round(seed, examples, Path(folder, "tried"))
            total += tried
            if status:
                failed.append(seed)
            said = {0: "passed", 1: "FAILED"}.get(status, f"DID NOT END, exit status {status}")
            print(f"seed {seed}: {said}, {sum(total.values())} inputs so far", flush=True)
            seed += 1
    for name, count in sorted(total.items()):
        print(f"{count:9d}  {name}")
    print(f"{sum(total.values()):9d}  inputs in {time.monotonic() - began:.0f} seconds; rounds: {seed - first}")
    for one in failed:
        print(f"to repeat: FUZZ_EXAMPLES={examples} {sys.executable} -m pytest tests/fuzz --hypothesis-seed {one}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
