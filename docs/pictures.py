"""Makes the pictures of the README from pages that rayexp wrote, with headless Chromium.

    python docs/pictures.py --diff runs/RUN/diff.html --compare runs/COMPARE/report.html

Writes docs/diff.png and docs/compare.png, each at most 200 kB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

LIMIT = 200_000  # bytes
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def picture(page: Path, out: Path, width: int, height: int) -> None:
    """A screenshot of the top of a page, with as many colours as fit into the limit."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [chromium, *FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run(
            [*command, f"--window-size={width},{height}", page.resolve().as_uri()], check=True, capture_output=True
        )
        image = Image.open(shot).convert("RGB")
        for colours in (256, 128, 64, 32):
            image.quantize(colours).save(out, optimize=True)
            if out.stat().st_size <= LIMIT:
                break
    print(f"{out}: {out.stat().st_size} bytes")


def main() -> None:
    """Parse and make what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diff", type=Path)
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    here = Path(__file__).parent
    if args.diff:
        picture(args.diff, here / "diff.png", 1100, 1000)
    if args.compare:
        picture(args.compare, here / "compare.png", 1160, 1000)


if __name__ == "__main__":
    main()
